"""A Hugging Face tokenizer (`tokenizer.json`) and its chat template behind jaxlm's interface. Needs the extra `hf`.

Special tokens are the control symbols here: text never produces one, whatever the file's own habits, and in a chat
only the template does, never a message. Tokens that the file adds without calling them special (Qwen's <think>) are
text like any other. Pieces that stand for bytes follow the two forms that published files have: byte-level (GPT-2,
Llama 3, Qwen) and sentencepiece's U+2581 with byte fallback (Llama 2, Mistral, Gemma). The second may put a space
before a text: `decode` shows it, as it is in the ids.
"""

import copy
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterable

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.tokenizer import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Mark a special token's text inside a message while the template runs: noncharacters, which Unicode keeps out of texts.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """The tokenizer of a Hugging Face folder, used as it is; nothing is trained."""

    path: str


def _needs_extra(package: str) -> UserError:
    return UserError(f'a Hugging Face tokenizer needs the package {package}: pip install -e ".[hf]"')


def _text_of(token) -> str | None:
    """Configs spell a token as its text or as {"content": text, ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _byte_level() -> dict[str, int]:
    """GPT-2's table of a printable character for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _types(node) -> set[tuple[str, str]]:
    """(type, replaced pattern) of a component of tokenizer.json and of everything inside it."""
    if isinstance(node, dict):
        pattern = node.get("pattern")
        pattern = pattern.get("String", "") if isinstance(pattern, dict) else ""
        own = {(node["type"], pattern)} if isinstance(node.get("type"), str) else set()
        return own.union(*map(_types, node.values()))
    return set().union(*map(_types, node)) if isinstance(node, list) else set()


class HuggingFaceTokenizer(Tokenizer):
    kind = "hf"

    def __init__(self, definition: bytes, settings: dict):
        """`definition` is the content of a tokenizer.json, `settings` what `read_settings` gives."""
        try:
            import tokenizers
        except ImportError:
            raise _needs_extra("tokenizers") from None
        self._definition, self._settings = definition, settings
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition.decode())
        except Exception as e:  # the library raises bare Exception
            raise UserError(f"the tokenizer.json cannot be read: {e}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # their text is text
        added = self._tokenizer.get_added_tokens_decoder()
        named = {t for t in (settings["tokens"].get(name) for name in SPECIAL) if t is not None}
        # A token that the config names as bos, eos, ... is special even where tokenizer.json forgot to say so. Gemma 3
        # has one that its text models have no embedding for.
        size = settings["vocab_size"]
        self.control = {
            t.content: i
            for i, t in sorted(added.items())
            if (t.special or t.content in named) and (size is None or i < size)
        }
        self._strips = {t.content: (t.lstrip, t.rstrip) for t in added.values()}
        self._added = {i: t.content for i, t in added.items()}
        self.id_bytes = self._bytes_of_ids()
        self.bos, self.eos = settings["bos"], settings["eos"]
        # Padding is masked wherever it stands, so any id does where the vocabulary has none of its own.
        self.pad = next(i for i in (settings["pad"], self.eos, self.bos, 0) if i is not None)
        for name in ("bos", "eos", "pad"):
            if (i := getattr(self, name)) is not None and not 0 <= i < self.vocab_size:
                raise UserError(f"the tokenizer's {name} id {i} is outside its {self.vocab_size} pieces")

    def __reduce__(self):
        # The library's own pickle forgets that special tokens in a text are text.
        return type(self), (self._definition, self._settings)

    def _bytes_of_ids(self) -> list[bytes]:
        decoder = _types(json.loads(self._definition).get("decoder"))
        kinds = {kind for kind, _ in decoder}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special}
        vocabulary = {piece: i for piece, i in vocabulary.items() if piece in self.control or piece not in special}
        largest, size = max(vocabulary.values(), default=-1) + 1, self._settings["vocab_size"]
        if size is not None and largest > size:
            raise UserError(f"the tokenizer has {largest} pieces, the model beside it embeds {size}")
        out = [b""] * (largest if size is None else size)  # a model may have rows that no piece uses
        if "ByteLevel" in kinds:
            table = _byte_level()

            def decode(piece):
                return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()

        elif "Metaspace" in kinds or ("Replace", "\u2581") in decoder:

            def decode(piece):
                if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
                    return bytes([int(piece[3:5], 16)])
                return piece.replace("\u2581", " ").encode()

        else:
            raise UserError(f"the tokenizer's decoder {sorted(kinds)} is unsupported; ByteLevel and Metaspace are")
        for piece, i in vocabulary.items():
            if piece not in self.control:
                out[i] = self._added[i].encode() if i in self._added else decode(piece)
        return out

    def encode_batch(self, texts):
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise UserError(
                    f"text is not valid Unicode: lone surrogate {text[e.start]!r} at character {e.start}"
                ) from None
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def files(self):
        return {
            "huggingface.json": self._definition,
            "settings.json": json.dumps(self._settings, ensure_ascii=False, indent=1, sort_keys=True).encode(),
        }

    def published_files(self) -> dict[str, bytes]:
        """The tokenizer as a Hugging Face folder keeps it, with the settings that are known here."""
        tokens = {name: text for name, text in self._settings["tokens"].items() if text is not None}
        about = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens
        if self.chat_template is not None:
            about["chat_template"] = self.chat_template
        text = json.dumps(about, ensure_ascii=False, indent=2) + "\n"
        return {"tokenizer.json": self._definition, "tokenizer_config.json": text.encode()}

    # ------------------------------------------------------------------------------------------------------- chats
    @property
    def chat_template(self) -> str | None:
        return self._settings["chat_template"]

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = False, **variables) -> str:
        """The chat as text, with special tokens spelled out: to look at; `apply_chat_template` gives the ids."""
        return self._restore(self._render(messages, add_generation_prompt, variables), dict.fromkeys(self.control))

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False, **variables) -> list[int]:
        """Ids of a chat after the template that came with the model.

        messages: [{"role": ..., "content": ...}, ...]; `variables` (tools=..., enable_thinking=...) go to the
        template. Special tokens written inside a message stay text. `UserError` without a template, or where the
        template refuses the messages.
        """
        rendered = self._render(messages, add_generation_prompt, variables)
        ids, begin = [], 0
        names = sorted(self.control, key=len, reverse=True)
        found = re.finditer("|".join(map(re.escape, names)), rendered) if names else ()
        segments = []
        for match in found:
            segments += [rendered[begin : match.start()], match.group()]
            begin = match.end()
        segments.append(rendered[begin:])
        for k, segment in enumerate(segments):
            if k % 2:
                ids.append(self.control[segment])
                continue
            if k > 0 and self._strips[segments[k - 1]][1]:
                segment = segment.lstrip()
            if k + 1 < len(segments) and self._strips[segments[k + 1]][0]:
                segment = segment.rstrip()
            if segment:
                tokenizer = self._tokenizer if k == 0 else self._continuing
                ids += tokenizer.encode(self._restore(segment, self.control), add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _continuing(self):
        """The same tokenizer for text that follows a special token, where sentencepiece puts no space before it."""
        import tokenizers

        definition = json.loads(self._definition)
        stack = [definition.get("pre_tokenizer")]
        while stack:
            node = stack.pop()
            if isinstance(node, list):
                stack += node
            elif isinstance(node, dict):
                stack += node.values()
                if node.get("type") == "Metaspace" and node.get("prepend_scheme") == "first":
                    node["prepend_scheme"] = "never"
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _render(self, messages, add_generation_prompt, variables) -> str:
        if self.chat_template is None:
            raise UserError("this tokenizer came without a chat template; give the text itself")
        messages = [{k: v for k, v in m.items() if v is not None} for m in self._hide(copy.deepcopy(messages))]
        try:
            import jinja2
        except ImportError:
            raise _needs_extra("jinja2") from None
        tokens = {name: text for name, text in self._settings["tokens"].items() if text is not None}
        given = {"tools": None, "documents": None} | {k: self._hide(v) for k, v in variables.items()}
        try:
            template = _compile(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens | given)
        except jinja2.TemplateError as e:
            raise UserError(f"the chat template refuses these messages: {e}") from None
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as e:
            raise UserError(f"the chat template fails on these messages: {type(e).__name__}: {e}") from None

    def _hide(self, value):
        """`value` with every special token inside its strings replaced by a mark that the template passes through."""
        if isinstance(value, dict):
            return {self._hide(k): self._hide(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(v) for v in value]
        if not isinstance(value, str):
            return value
        if _OPEN in value or _CLOSE in value:
            raise UserError(f"messages may not contain the noncharacters {_OPEN!r} and {_CLOSE!r}")
        for name in sorted(self.control, key=len, reverse=True):
            value = value.replace(name, f"{_OPEN}{self.control[name]}{_CLOSE}")
        return value

    def _restore(self, text: str, names: Iterable[str]) -> str:
        for name in names:
            text = text.replace(f"{_OPEN}{self.control[name]}{_CLOSE}", name)
        return text


@functools.cache
def _compile(source: str):
    """The template in jinja's immutable sandbox, with the filters and functions that published templates expect.

    A template is code from a stranger: it sees strings, numbers, lists and dicts, and nothing with dangerous methods.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    if tuple(int(n) for n in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise UserError(f"jinja2 {jinja2.__version__} has known holes in its sandbox; install 3.1.6 or newer")

    class Generation(Extension):
        """{% generation %} marks the assistant's part for training masks; its content is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore, which lead to the interpreter's insides."""

        def __init__(*args, **kwargs):
            for name in dict(*args[1:], **kwargs):
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name, value):
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name):
            if str(name).startswith("_"):
                raise SecurityError(f"namespace attribute {name!r} begins with an underscore")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


# ---------------------------------------------------------------------------------------------------------- folders
def from_folder(folder, vocab_size: int | None = None) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder, or of one that `save` wrote. `UserError` when it holds none.

    vocab_size: how many ids the model embeds, by default what a config.json beside the tokenizer says, if there is one;
    a model may embed more than its tokenizer has pieces.
    """
    folder = storage.path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if (folder / "huggingface.json").exists():
        return load(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"{folder} has no tokenizer.json; open it once with transformers' AutoTokenizer and save_pretrained it"
        )
    definition = (folder / "tokenizer.json").read_bytes()
    try:
        content = json.loads(definition)
    except ValueError as e:
        raise UserError(f"{folder / 'tokenizer.json'} is not valid JSON: {e}") from None
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{folder / 'tokenizer.json'} is not a Hugging Face tokenizer: it has no model")
    return HuggingFaceTokenizer(definition, read_settings(folder, content, vocab_size))


def read_settings(folder, definition: dict, vocab_size: int | None = None) -> dict:
    """bos, eos and pad as ids, the special tokens' texts, the chat template, wherever the folder keeps them."""

    def read(name):
        found = storage.read_json(folder / name) if (folder / name).exists() else {}
        return found if isinstance(found, dict) else {}

    config, older = read("tokenizer_config.json"), read("special_tokens_map.json")
    model = read("config.json") | read("generation_config.json")
    vocab_size = vocab_size or model.get("vocab_size") or (model.get("text_config") or {}).get("vocab_size")
    tokens = {name: _text_of(config.get(name, older.get(name))) for name in SPECIAL}
    ids = {token["content"]: token["id"] for token in definition.get("added_tokens") or []}
    vocabulary = definition["model"].get("vocab")
    if isinstance(vocabulary, dict):
        ids = vocabulary | ids
    texts = {i: text for text, i in ids.items()}

    def id_of(name):
        if tokens[f"{name}_token"] is not None:
            return ids.get(tokens[f"{name}_token"])
        found = model.get(f"{name}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        # The model's own config also states ids that its tokenizer does not have (defaults of the class).
        return found if isinstance(found, int) and found in texts else None

    settings = {name: id_of(name) for name in ("bos", "eos", "pad")}
    for name, i in settings.items():
        if i is not None and tokens[f"{name}_token"] is None:
            tokens[f"{name}_token"] = texts[i]
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name
        named = {t["name"]: t["template"] for t in template}
        template = named.get("default", next(iter(named.values()), None))
    return {**settings, "tokens": tokens, "chat_template": template, "vocab_size": vocab_size}


def load(directory) -> HuggingFaceTokenizer:
    """What `save` wrote; `data.tokenizer.load` calls this."""
    directory = storage.path(directory)
    definition = (directory / "huggingface.json").read_bytes()
    return HuggingFaceTokenizer(definition, json.loads((directory / "settings.json").read_text(encoding="utf-8")))


def train(cfg: HFTokenizer, texts: Iterable[str], seed: int = 0) -> HuggingFaceTokenizer:
    """The tokenizer of the folder `cfg.path`; the texts are not read, as it is trained already."""
    return from_folder(cfg.path)
