"""What launch.rounds measures on held-out prompts: gold, KL, best-of-n, Elo."""

import numpy as np

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.feedback import arena, pairwise
from jaxlm.feedback.collect import read_prompts
from jaxlm.feedback.gold import gold, parts
from jaxlm.feedback.records import Response, record_id
from jaxlm.feedback.store import Store
from jaxlm.run import arena_plot, reward, rounds
from jaxlm.run.load import Run, load_run
from jaxlm.run.side_by_side import transcript
from jaxlm.sample.engine import Sampling

SHOWN = 3  # transcripts of each kind of errand


def _heldout(p, run: Run, store: Store, count: int, temperature: float = 1.0) -> list[list[Response]]:
    sampling = Sampling(temperature=temperature, max_tokens=p.x.max_tokens, seed=p.x.seed)
    return rounds.respond(store, run, read_prompts(p.root / "heldout.jsonl"), count, sampling, p.tools())


def _open(p) -> Store:
    return Store(p.root / "evaluation.db")


def baseline(p) -> dict:
    """Responses of round 0's policy to held-out prompts, for all rounds."""
    prompts, run = read_prompts(p.root / "heldout.jsonl"), load_run(p.policy(0))
    with _open(p) as store:
        golds = rounds.scored(gold, prompts, _heldout(p, run, store, p.x.best_of))
        greedy = rounds.scored(gold, prompts, _heldout(p, run, store, 1, 0.0))
    spread = float((golds.std(1) > 0).mean())
    print(f"gold {golds.mean():.3f}, greedy {greedy.mean():.3f}; {spread:.2f} of the prompts have a spread of it")
    return {
        "gold": rounds.estimate(golds.mean(1)),
        "greedy": rounds.estimate(greedy[:, 0]),
        "prompts_with_spread": spread,
    }


def _parts(prompts, found: list[list[Response]]) -> dict[str, float]:
    """The mean of each part of gold."""
    each = [parts(pairwise.completion_of(r), q.metadata) for q, rs in zip(prompts, found) for r in rs]
    return {name: float(np.mean([e[name] for e in each])) for name in each[0]}


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Of two arrays; None where one is constant."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if a.std() > 0 and b.std() > 0 else None


def evaluate(p, k: int) -> dict:
    """Round k's policy, and best-of-n of round 0's by the same reward model."""
    prompts = read_prompts(p.root / "heldout.jsonl")
    first, policy = load_run(p.policy(0)), load_run(p.policy(k))
    learned = reward.reward_function(p.root / f"round_{k}" / "reward", first.tokenizer.hash)
    with _open(p) as store:
        old, old_greedy = _heldout(p, first, store, p.x.best_of), _heldout(p, first, store, 1, 0.0)
        new, greedy = _heldout(p, policy, store, p.x.samples), _heldout(p, policy, store, 1, 0.0)
        elo = _elo(p, k, store)
    gold_PN, gold_PS = (rounds.scored(gold, prompts, found) for found in (old, new))
    proxy_PN, proxy_PS = (rounds.scored(learned, prompts, found) for found in (old, new))
    first_greedy_P, greedy_P = (rounds.scored(gold, prompts, found)[:, 0] for found in (old_greedy, greedy))
    kl_PS = rounds.log_ratios(policy, first, prompts, new)
    c = rounds.curve(proxy_PN, gold_PN)
    sft_P, ppo_P = gold_PN.mean(1), gold_PS.mean(1)
    best_P, last_P = gold_PN[np.arange(len(prompts)), proxy_PN.argmax(1)], c.gain_KP[-1] + sft_P
    found = {
        "gold": {name: rounds.estimate(v) for name, v in (("sft", sft_P), ("sft, greedy", first_greedy_P),
                 ("ppo", ppo_P), ("ppo, greedy", greedy_P), (f"best of {c.ns[-1]}", last_P))},
        "gain": rounds.estimate(ppo_P - sft_P),
        "gain_greedy": rounds.estimate(greedy_P - first_greedy_P),
        "kl": rounds.estimate(kl_PS.mean(1)),
        "share": rounds.share(c, kl_PS, ppo_P - sft_P, p.x.seed),
        "curve": rounds.points(c, proxy_PN, gold_PN),
        "proxy": {"sft": float(proxy_PN.mean()), "ppo": float(proxy_PS.mean())},
        "proxy_and_gold": _correlation(proxy_PN, gold_PN),
        "parts": {"sft": _parts(prompts, old), "ppo": _parts(prompts, new)},
        "kinds": rounds.by_kind([q.metadata["kind"] for q in prompts], {"sft": sft_P, f"best of {p.x.best_of}": best_P,
                                                                       "ppo": ppo_P, "kl": kl_PS.mean(1)}),
        "elo": elo,
        "shown": _shown(prompts, (old, gold_PN), proxy_PN, (new, gold_PS)),
    }  # fmt: skip
    g, s = found["gain"], found["share"]
    print(f"gold {sft_P.mean():.3f} -> {ppo_P.mean():.3f}: {g['value']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}], KL "
          f"{s['kl']:.2f}, {s['value']:.2f} of best-of-n's gain there")  # fmt: skip
    return found


def _elo(p, k: int, store: Store) -> dict:
    runs = {f"round {n}" if n else "sft": load_run(p.policy(n)) for n in range(k + 1)}
    return standings(p, runs, store, f"gold, round {k}", f"elo_{k}")


def standings(p, runs: dict[str, Run], store: Store, annotator: str, picture: str) -> dict:
    """Elo of these policies by the gold of their first responses to the same held-out prompts; the first has 1000."""
    names, firsts = {}, set()
    for name, run in runs.items():
        names[f"{run.workdir}@{run.step}"] = name
        firsts |= {record_id(found[0]) for found in _heldout(p, run, store, 1)}
    pairwise.annotate(store, annotator, pairwise.by_scores(gold), chosen=lambda r: record_id(r) in firsts)
    games = [g._replace(a=names[g.a], b=names[g.b]) for g in arena.games_of(store, [annotator], firsts)]
    result = arena.arena(games, next(iter(runs)), seed=p.x.seed)
    print(arena.table(result))
    try:
        arena_plot.standings(result, storage.make_dir(p.root / "report") / f"{picture}.png")
    except UserError as error:  # without matplotlib there are numbers without a picture
        print(error)
    return result.as_dict()


def _shown(prompts, sft, proxy_PN: np.ndarray, ppo) -> list[dict]:
    """What was said to a few prompts of each kind: a response of round 0, the best of its by the reward, a new one."""
    shown, counts = [], {}
    for i, q in enumerate(prompts):
        kind = q.metadata["kind"]
        if counts.setdefault(kind, 0) == SHOWN:
            continue
        counts[kind] += 1
        chosen = {"sft": (*sft, 0), "best of n": (*sft, int(proxy_PN[i].argmax())), "ppo": (*ppo, 0)}
        replies = {
            who: [transcript(found[i][j].message), float(golds[i, j])] for who, (found, golds, j) in chosen.items()
        }
        asked = q.conversation.messages[-1].text
        shown.append({"kind": kind, "asked": asked, "truth": q.metadata["answer"], "replies": replies})
    return shown
