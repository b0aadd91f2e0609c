"""The search on planted answers and times: the best combination is found, the constraint holds, nothing is hidden."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmcut.errors import VlmcutError
from vlmcut.validation.search import Cost, Outcome, search, within
from vlmcut.validation.search_axes import Axis, Choice, Level

QUESTIONS = 200


def axis(name: str, levels: int, slot: str = "", baseline: bool = False) -> Axis:
    return Axis(name, tuple(Level(f"{name} {i}", {}) for i in range(levels)), slot, baseline)


@dataclass
class Planted:
    """Losses add up, what is left of each part of the cost multiplies: predictions are exact."""

    axes: Sequence[Axis]
    losses: Sequence[Sequence[float]]  # of each axis and level, questions lost
    left: Sequence[Sequence[tuple[float, float]]]  # of the two parts of the cost
    refuse: Callable[[Choice], bool] = lambda choice: False
    whole: tuple[float, float] = (0.4, 0.6)
    grain: float = 1 / QUESTIONS
    asked: list[Choice] = field(default_factory=list)
    batches: list[tuple[bool, list[Choice]]] = field(default_factory=list)

    def refusal(self, choice: Choice) -> str | None:
        return "they do not go together" if self.refuse(choice) else None

    def quality(self, choice: Choice) -> float:
        self.asked.append(choice)
        return 1 - sum(self.losses[axis][level] for axis, level in choice) / QUESTIONS

    def cost(self, choice: Choice) -> Cost:
        parts = tuple(
            whole * math.prod(self.left[axis][level][part] for axis, level in choice)
            for part, whole in enumerate(self.whole)
        )
        return Cost(sum(parts), parts, 10 * sum(parts))

    def costs(self, choices: Sequence[Choice], *, final: bool = False) -> list[Cost]:
        self.batches.append((final, list(choices)))
        return [self.cost(choice) for choice in choices]

    def every(self) -> list[Choice]:
        """All recipes that may be, without baselines and the original."""
        ranges = [[None, *range(len(a.levels))] if not a.baseline else [None] for a in self.axes]
        found = []
        for levels in itertools.product(*ranges):
            choice = tuple((a, level) for a, level in enumerate(levels) if level is not None)
            slots = [self.axes[a].slot for a, _ in choice if self.axes[a].slot]
            if choice and len(set(slots)) == len(slots) and not self.refuse(choice):
                found.append(choice)
        return found

    def best(self, least: float) -> float:
        """By trying everything."""
        keeps = [c for c in self.every() if self._keeps(c, least)]
        return min(self.cost(c).ratio for c in keeps)

    def _keeps(self, choice: Choice, least: float) -> bool:
        return 1 - sum(self.losses[axis][level] for axis, level in choice) / QUESTIONS >= least


def three() -> Planted:
    """The tower's and the language model's cuts add up; tokens save most alone, but their last level loses too much."""
    return Planted(
        (axis("tower", 3), axis("random", 2, "tokens", baseline=True), axis("tokens", 3, "tokens"), axis("lm", 2)),
        ((0, 1, 30), (50, 90), (0, 2, 9), (1, 2)),
        (
            ((0.8, 1.0), (0.6, 1.0), (0.3, 1.0)),
            ((1.0, 0.5), (1.0, 0.3)),
            ((1.0, 0.5), (1.0, 0.3), (1.0, 0.2)),
            ((1.0, 0.7), (1.0, 0.6)),
        ),
    )


def run(judge: Planted, least: float = 0.98, width: int = 3, over: Callable[[], bool] = lambda: False) -> Outcome:
    return search(judge.axes, judge, least=least, width=width, over=over)


def test_the_best_combination_is_found() -> None:
    judge = three()
    found = run(judge)
    # 1 + 2 of tower, tokens and lm lose 1 + 2 + 1 = 4 of 200 questions; one level more of lm would lose 5.
    assert found.winner == ((0, 1), (2, 1), (3, 0))
    assert found.final[found.winner].ratio == judge.best(0.98) == pytest.approx(0.4 * 0.6 + 0.6 * 0.3 * 0.7)
    assert found.single == ((2, 1),)
    assert found.gain == pytest.approx((0.24 + 0.126) / (0.4 + 0.18))
    assert all(found.points[c].quality >= 0.98 for c in found.final)


def test_predictions_are_products_of_what_was_measured_alone() -> None:
    judge = three()
    found = run(judge)
    combined = [p for p in found.points.values() if len(p.choice) > 1]
    assert combined
    for point in combined:
        assert point.predicted == pytest.approx(judge.cost(point.choice).ratio)
    assert all(p.predicted is None for p in found.points.values() if len(p.choice) == 1)


def test_measured_only_what_kept_the_answers() -> None:
    judge = three()
    found = run(judge)
    measured = {c for _, batch in judge.batches for c in batch}
    for choice in measured:
        assert found.points[choice].quality >= 0.98 or judge.axes[choice[0][0]].baseline
    assert measured == {c for c, p in found.points.items() if p.cost is not None}
    # Every batch of combinations has the best so far beside it, and the last one the best single cut.
    assert all(any(len(c) == 1 or c in seen for c in batch) for seen, batch in _earlier(judge.batches))
    final = [batch for last, batch in judge.batches if last]
    assert len(final) == 1 and judge.batches[-1][0] and found.single in final[0] and found.winner in final[0]


def _earlier(batches: list[tuple[bool, list[Choice]]]) -> list[tuple[set[Choice], list[Choice]]]:
    found, seen = [], set()
    for _, batch in batches[1:]:
        seen |= {c for c in batches[0][1]}
        found.append((set(seen), batch))
        seen |= set(batch)
    return found


def test_baselines_are_asked_at_every_level_and_never_combined() -> None:
    judge = three()
    found = run(judge, least=0.5)  # random's first level would keep it
    assert {((1, 0),), ((1, 1),)} <= found.points.keys()
    assert all(found.points[((1, level),)].cost is not None for level in range(2))
    assert all(len(c) == 1 or all(a != 1 for a, _ in c) for c in judge.asked)
    assert found.single != ((1, 0),) and found.winner == ((0, 2), (2, 2), (3, 1))


def test_nothing_stronger_than_what_failed_is_asked() -> None:
    judge = three()
    found = run(judge)
    failed = [c for c, p in found.points.items() if p.quality < 0.98 and c[0][0] != 1]
    assert failed
    order = {c: i for i, c in enumerate(judge.asked)}
    assert len(order) == len(judge.asked)  # nothing twice
    for choice, bad in itertools.product(judge.asked, failed):
        assert not within(choice, bad) or order[choice] <= order[bad]
    assert all(any(within(c, bad) for bad in failed) for c in found.beyond)
    assert not set(found.beyond) & found.points.keys()


def test_a_cut_that_does_not_pay_is_measured_once_and_left() -> None:
    judge = three()
    judge.left = (judge.left[0], judge.left[1], judge.left[2], ((1.0, 1.1), (1.0, 1.0)))
    found = run(judge)
    assert found.points[((3, 0),)].cost is not None
    assert found.winner == ((0, 1), (2, 1)) and all(len(c) == 1 or c[-1][0] != 3 for c in found.points)


def test_a_level_that_costs_more_than_the_one_before_is_listed_as_dear() -> None:
    judge = Planted(
        (axis("a", 2), axis("b", 1)), ((0, 0), (0,)), (((0.5, 1.0), (0.6, 1.0)), ((1.0, 0.9),)),
    )  # fmt: skip
    found = run(judge, width=1)
    assert found.winner == ((0, 0), (1, 0)) and found.dear == (((0, 1), (1, 0)),)
    assert not set(found.dear) & found.points.keys()


def test_no_combination_beats_the_single_one() -> None:
    judge = three()
    judge.losses = ((3, 3, 30), (50, 90), (4, 4, 9), (3, 3))  # any two lose too much
    found = run(judge)
    assert found.winner == found.single == ((2, 1),) and found.gain == 1
    assert any(len(c) == 2 for c in judge.asked)


def test_of_equal_ones_the_first_with_fewer_cuts() -> None:
    judge = Planted((axis("a", 1), axis("b", 1), axis("c", 1)), ((0,),) * 3, (((0.5, 0.5),),) * 3)
    found = run(judge, width=1)
    assert found.single == ((0, 0),)
    assert found.winner == ((0, 0), (1, 0), (2, 0))
    again = run(Planted(judge.axes, judge.losses, judge.left), width=1)
    assert list(again.points) == list(found.points) and again == found
    flat = Planted((axis("a", 1), axis("b", 1)), ((0,), (0,)), (((0.5, 0.5),), ((0.9, 0.9),)))
    flat.cost = lambda choice: Cost(0.5, (0.2, 0.3), 5.0)  # type: ignore[method-assign]
    assert run(flat).winner == ((0, 0),)  # not the pair, which costs as much


def test_what_a_plan_refuses_is_listed_with_the_reason() -> None:
    judge = three()
    judge.refuse = lambda choice: within(choice, ((0, 0), (3, 0)))
    found = run(judge)
    assert found.winner == ((0, 1), (2, 1))  # better than tokens and lm
    assert found.refused and set(found.refused.values()) == {"they do not go together"}
    assert not found.refused.keys() & found.points.keys()


def test_when_the_time_is_over_what_was_not_asked_is_said() -> None:
    whole = run(three())
    counts = []
    for most in range(1, len(whole.points)):
        judge = three()
        if most < 3:  # the first single cut that pays and what comes with it
            continue
        found = run(judge, over=lambda judge=judge, most=most: len(judge.asked) >= most)
        assert len(found.points) == most and found.left
        assert not set(found.left) & found.points.keys()
        assert found.points[found.winner].quality >= 0.98 and found.final  # measured all the same
        counts.append(found.final[found.winner].ratio)
    assert counts and min(counts) >= whole.final[whole.winner].ratio
    assert not whole.left


def test_no_time_at_all() -> None:
    with pytest.raises(VlmcutError, match="nothing was asked: 0 cuts do not apply, and the time was over for 10") as e:
        run(three(), over=lambda: True)
    assert "--minutes" in (e.value.hint or "")


def test_nothing_keeps_the_answers() -> None:
    judge = three()
    judge.losses = ((7, 8, 30), (1, 1), (7, 9, 9), (30, 60))
    with pytest.raises(VlmcutError, match=r"keeps 0\.98 .* the best, tower 0, keeps 0\.9650") as error:  # not random
        run(judge)
    assert "0.965 or less" in (error.value.hint or "")


def test_nothing_pays() -> None:
    judge = three()
    judge.left = [[(1.0, 1.05)] * 3] * 4
    with pytest.raises(VlmcutError, match=r"costs less than the original; the cheapest, tower 0, costs 1\.030 of it"):
        run(judge)


LEFT = st.tuples(st.sampled_from((0.5, 0.7, 0.9, 1.0, 1.1)), st.sampled_from((0.4, 0.6, 0.8, 1.0)))


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), LEFT), min_size=1, max_size=3), min_size=1, max_size=4))
def test_any_landscape(plan: list[list[tuple[int, tuple[float, float]]]]) -> None:
    """The constraint holds, the winner is never worse than the best single cut or better than the true best."""
    losses = [list(itertools.accumulate(loss for loss, _ in one)) for one in plan]
    judge = Planted([axis(f"a{i}", len(one)) for i, one in enumerate(plan)], losses, [[x for _, x in o] for o in plan])
    try:
        found = run(judge, width=4)
    except VlmcutError:
        singles = [c for c in judge.every() if len(c) == 1 and judge._keeps(c, 0.98)]
        assert all(judge.cost(c).ratio >= 1 for c in singles)
        return
    best = judge.best(0.98)
    ratio = found.final[found.winner].ratio
    assert found.points[found.winner].quality >= 0.98 and found.points[found.single].quality >= 0.98
    assert best - 1e-12 <= ratio <= found.final[found.single].ratio
    assert ratio <= max(best * 1.35, best + 0.1)  # a beam is no proof: how far it may be off here


def test_within() -> None:
    assert within(((0, 2), (3, 1)), ((0, 1),)) and within(((0, 1),), ((0, 1),)) and within(((0, 1),), ())
    assert not within(((0, 0),), ((0, 1),)) and not within(((0, 2),), ((0, 1), (1, 0)))


def test_the_longer_rounds_decide() -> None:
    """Winner and best single cut are those of the last meeting, whatever shorter rounds said."""
    judge = Planted((axis("a", 1), axis("b", 1)), ((0,), (0,)), (((0.5, 0.5),), ((0.6, 0.6),)))
    costs = judge.costs
    late = {((0, 0),): 0.7, ((1, 0),): 0.4, ((0, 0), (1, 0)): 0.6}

    def changed(choices: Sequence[Choice], *, final: bool = False) -> list[Cost]:
        found = costs(choices, final=final)
        return [Cost(late[c], (late[c],), 1.0) for c in choices] if final else found

    judge.costs = changed  # type: ignore[method-assign]
    found = run(judge)
    assert found.winner == found.single == ((1, 0),) and found.gain == 1
    assert {c: cost.ratio for c, cost in found.final.items()} == late
    assert found.points[((1, 0),)].cost == found.final[((1, 0),)]


def test_stronger_levels_of_what_failed_alone_are_not_asked() -> None:
    judge = Planted((axis("a", 4), axis("b", 1)), ((0, 9, 0, 0), (0,)), (((0.9, 0.9),) * 4, ((0.8, 0.8),)))
    found = run(judge)
    assert found.beyond == (((0, 2),), ((0, 3),)) and found.winner == ((0, 0), (1, 0))
    assert not {((0, 2),), ((0, 3),)} & set(judge.asked)


def test_one_axis_of_a_slot() -> None:
    judge = Planted(
        (axis("one", 1, "tokens"), axis("other", 1, "tokens"), axis("b", 1)),
        ((0,), (0,), (0,)), (((0.5, 0.5),), ((0.6, 0.6),), ((0.9, 0.9),)),
    )  # fmt: skip
    found = run(judge)
    assert found.winner == ((0, 0), (2, 0)) and ((1, 0), (2, 0)) in found.points
    assert all(not {0, 1} <= {a for a, _ in choice} for choice in judge.asked)


def test_the_beam_takes_the_cheapest_and_what_saved_most_for_each_question_lost() -> None:
    judge = Planted(
        (axis("tokens", 2), axis("b", 1), axis("c", 1)),
        ((0, 4), (1,), (0,)), (((0.5, 0.5), (0.3, 0.3)), ((0.49, 0.49),), ((0.9, 0.9),)),
    )  # fmt: skip
    found = run(judge, width=2)
    assert found.winner == ((0, 0), (1, 0), (2, 0))
    assert ((1, 0), (2, 0)) not in judge.asked  # both levels of tokens were in the beam: neither b nor c was


def test_what_left_the_beam_on_a_wrong_prediction_is_measured_in_the_end() -> None:
    judge = Planted((axis("a", 1), axis("b", 1), axis("c", 1)), ((0,), (2,), (2,)),
                    (((0.5, 0.5),), ((0.6, 0.6),), ((0.7, 0.7),)))  # fmt: skip
    plain = judge.cost
    slow = ((0, 0), (1, 0))
    judge.cost = lambda choice: Cost(0.6, (0.2, 0.4), 6.0) if choice == slow else plain(choice)  # type: ignore[method-assign]
    judge.refuse = lambda choice: len(choice) > 2
    found = run(judge, width=1)
    assert found.points[slow].predicted == pytest.approx(0.3) and found.points[slow].cost == Cost(0.6, (0.2, 0.4), 6.0)
    assert found.winner == ((0, 0), (2, 0)) and found.single == ((0, 0),)
