"""The wrongs that rows can have on their way from a conversation to the step: the check beside each notices."""

import tempfile

import numpy as np

from jaxlm.data import chat, loader, packing
from jaxlm.data.conversation import render
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.trajectory import Trajectory
from tests.data import test_chat, test_packing
from tests.rl.mutate import Mutation, mutation_tests

TOKENIZER = BytesTokenizer()


# ----------------------------------------------------------------------------------------------------------- checks
def batch_of(packed) -> Trajectory:
    """Every row of a set once, as training gets them."""
    with loader.Loader({"one": packed}, packed.rows, seed=0) as rows:
        return rows.batch(0)


def segments_of(b: Trajectory) -> list[tuple]:
    """(tokens, positions, loss mask) of each segment."""
    fields, out = [np.asarray(x) for x in (b.tokens, b.positions, b.loss_mask)], []
    for row, segments in enumerate(np.asarray(b.segments)):
        for s in range(1, segments.max() + 1):
            out.append(tuple(tuple(x[row, segments == s].tolist()) for x in fields))
    return sorted(out)


def conversations_are_trained_on_as_they_were_rendered():
    found = test_chat.talk(24)
    with tempfile.TemporaryDirectory() as folder:
        packed, _ = chat.pack_conversations(found, TOKENIZER, f"{folder}/rows", context=299, workers=1)
        batch = batch_of(packed)
    assert packed.rows < len(found) / 2  # rows hold several
    fields = [render(one, TOKENIZER) for one in found]
    names = ("tokens", "positions", "loss_mask")
    assert segments_of(batch) == sorted(tuple(tuple(f[n].tolist()) for n in names) for f in fields)
    assert not np.asarray(batch.loss_mask)[np.asarray(batch.segments) == 0].any()


def documents_begin_at_zero_and_are_scored_from_their_second_token():
    """By the packer that is written out token by token; the last row has padding."""
    texts = ["ab", "a b c", "", "bb a", "c"]
    with tempfile.TemporaryDirectory() as folder:
        packed = packing.pack(test_packing.docs(texts), TOKENIZER, f"{folder}/rows", context=9, workers=1)
        rows = packing.Reader(packed.directory).read(range(packed.rows))
    for i, name in enumerate(("tokens", "positions", "segments", "loss_mask")):
        np.testing.assert_array_equal(rows[name], test_packing.rows_by_hand(texts, 9, False)[..., i], err_msg=name)
    assert (rows["segments"][-1] == 0).any() and rows["segments"].max() > 2


TALK = conversations_are_trained_on_as_they_were_rendered
TEXT = documents_begin_at_zero_and_are_scored_from_their_second_token
MUTATIONS = (
    Mutation("the loss mask is lost under packing", chat, "mask[np.cumsum(sizes) - sizes] = False",
             "mask = np.ones(len(tokens), bool)", TALK),
    Mutation("the loss mask is lost on the way to the rows", chat, '(f["tokens"], f["loss_mask"])',
             '(f["tokens"], f["positions"] > 0)', TALK),
    Mutation("loss masks change places in a row", chat, "tokens, mask = (np.concatenate(parts) for parts in zip(*row))",
             "tokens, mask = (np.concatenate(x) for x in ([t for t, _ in row], [m for _, m in row[::-1]]))", TALK),
    Mutation("conversations of a row are one", chat, "sizes = np.array([len(t) for t, _ in row], np.uint32)",
             "sizes = np.array([len(tokens)], np.uint32)", TALK),
    Mutation("the loss mask is lost when rows are read", packing, "valid & ~starts & mask", "valid & ~starts", TALK),
    Mutation("positions not reset at a document boundary", packing, "np.where(valid, places - begins, 0)",
             "np.where(valid, places, 0)", TALK),
    Mutation("packed conversations see each other", packing, "np.where(valid, np.cumsum(starts, axis=1), 0)",
             "np.where(valid, 1, 0)", TALK),
    Mutation("a row of text is one document", packing, "if first == last:", "if True:", TEXT),
    Mutation("what begins a document is scored by the one before", packing, "valid & ~starts & mask", "valid & mask",
             TEXT),
    Mutation("padding is trained on", packing, "valid & ~starts & mask", "~starts & mask", TEXT),
    Mutation("the loss mask is lost in the loader", loader, "out[name][mine] = values",
             'out[name][mine] = values if name != "loss_mask" else out["positions"][mine] > 0', TALK),
    Mutation("positions are those of the row", loader, "out[name][mine] = values",
             'out[name][mine] = values if name != "positions" else np.arange(self._width)', TALK),
)  # fmt: skip


test_is_noticed, test_the_swap_alone_breaks_nothing = mutation_tests(MUTATIONS)
