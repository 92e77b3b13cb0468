"""How the ring's bars are made of figures, and what is read from a host's log. No servers, no lab."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab import parse_link
from bench.ring.__main__ import parse
from bench.ring.questions import LARGE, SMALL, words_for
from bench.ring.records import (
    Contexts,
    Loads,
    Model,
    Prompt,
    Run,
    Token,
    Turns,
    Visit,
    beside,
    from_worker,
    median_wire,
    per_token,
    to_worker,
)
from bench.ring.report import bars, tables
from bench.ring.sessions import Plan
from bench.ring.settings import pushes_of
from bench.ring.verdicts import MID_BYTES, Verdict, all_of, differing_texts
from bench.servers import Programs, Task
from bench.settings import layout_of
from mesh.engine.commands import check_layers
from mesh.models.demo import write_demo
from tests.unit.test_models_demo import small_vocab

LINK = "20 ms, 30 MB/s"


def model(**changes: object) -> Model:
    return Model(**({"name": "m", "bytes": MID_BYTES, "n_layers": 16, "n_embd": 1024} | changes))  # type: ignore[arg-type]


def ring(name: str = "ring", workers: int = 2, **changes: object) -> Run:
    return Run(**({"model": "m", "name": name, "workers": workers, "link": LINK, "limit_ms": 60.0} | changes))  # type: ignore[arg-type]


def token(over_solo: list[float], to: float = 4500.0, back: float = 4400.0) -> Token:
    return Token(over_solo, over_solo, [0.0], {"a>w1": to, "w2>a": back}, to, back)


def only(found: list[Verdict], words: str) -> Verdict:
    verdicts = [verdict for verdict in found if words in verdict.what]
    assert len(verdicts) == 1, [verdict.what for verdict in found]
    return verdicts[0]


@pytest.mark.parametrize(("ms", "met"), [([62.0, 90.0, 63.0], True), ([62.0, 63.1, 90.0], False)])
def test_the_median_over_solo_is_held_against_the_limit_and_a_twentieth(ms: list[float], met: bool) -> None:
    found = all_of([model()], [ring(token=token(ms)), ring("upstream", token=token([113.0]))])
    verdict = only(found, "over solo")
    assert (verdict.bar, verdict.upstream, verdict.met) == ("63.0", "113.0", met)


def test_bytes_per_token_may_be_an_activation_and_a_little() -> None:
    found = all_of([model()], [ring(token=token([1.0], to=5097, back=5095))])
    assert (only(found, "to a worker").met, only(found, "from a worker").met) == (False, True)


def test_a_load_is_held_against_a_read_of_the_largest_share() -> None:
    loads = Loads([0.7, 0.8, 0.9], [40_000, 301_000, 302_000])
    found = all_of([model(share_read_s={2: 0.16})], [ring(loads=loads)])
    assert only(found, "load s").met
    assert not only(found, "wire").met
    assert not only(all_of([model(share_read_s={2: 0.15})], [ring(loads=loads)]), "load s").met


def test_many_workers_are_held_against_one_with_the_largest_share() -> None:
    together, one = ring("load together", 3, loads=Loads([1.0], [1])), ring("load one", 1, loads=Loads([0.9], [1]))
    assert not only(all_of([model()], [together, one]), "against one").met


@pytest.mark.parametrize(("sent", "met"), [(18_200_000, True), (18_300_000, False)])
def test_a_long_prompt_may_cost_its_activations_and_a_tenth(sent: int, met: bool) -> None:
    run = ring(prompts=[Prompt(LARGE, 4000, [20.0], [], sent)], contexts=Contexts(9_000, 8_900))
    found = all_of([model()], [run])
    assert only(found, "4,000 tokens, to a worker").met is met
    assert only(found, "more per token").met


def test_prompts_are_held_against_solo_on_a_quick_link_and_against_others_on_a_slow_one() -> None:
    near = ring(link="lan", limit_ms=0.3, prompts=[Prompt(SMALL, 590, [1.5], [2.4], 1)])
    far = ring(prompts=[Prompt(SMALL, 590, [3.8], [], 1), Prompt(LARGE, 4000, [15.0], [], 1)])
    theirs = ring("upstream", prompts=[Prompt(SMALL, 590, [4.0], [], 1), Prompt(LARGE, 4000, [16.0], [], 1)])
    found = all_of([model()], [near, far, theirs])
    assert [verdict.met for verdict in found if verdict.what.startswith("prompt")] == [True, False, True]
    small = all_of([model(bytes=1000)], [near, far, theirs])
    assert [verdict.met for verdict in small if verdict.what.startswith("prompt")] == [None, None, None]


@pytest.mark.parametrize(("computed", "wire", "met"), [(28, 100_000, (True, True)), (2012, 8_000_000, (False, False))])
def test_coming_back_may_cost_the_new_words(computed: int, wire: int, met: tuple[bool, bool]) -> None:
    visits = [Visit("A", False, 2000, 2000, 9_000_000, 9_000_000, 9.0), Visit("A", True, 12, computed, 10, wire, 0.2)]
    found = all_of([model()], [ring(visits=visits)])
    assert (only(found, "tokens computed").met, only(found, "bytes of a worker").met) == met


def test_round_trips_are_those_of_the_ring_with_relays() -> None:
    counted = ring(link="relayed", turns=Turns(12, 13, 1.0, 1.0))
    assert not only(all_of([model()], [ring(), counted]), "round trips").met


def test_neighbours_that_do_not_push_are_a_bar_that_is_not_met() -> None:
    verdict = only(all_of([model()], [ring(pushes=["w1 -> w2"], push_faults=["w2 -> w3: no way"])]), "push")
    assert (verdict.met, verdict.measured) == (False, "1 of 2; w2 -> w3: no way")


def test_texts_are_compared_question_by_question_and_model_by_model() -> None:
    runs = [ring(texts={"short": "x", "long": "y"}), ring("solo", 0, texts={"short": "z"})]
    runs.append(ring("other", model="n", texts={"short": "q"}))
    assert differing_texts(runs) == [f"m, short: ring 2 ({LINK}) | solo 0 ({LINK})"]
    assert only(all_of([model()], runs), "single process").met is False


def test_upstream_may_say_something_else_and_is_told_of() -> None:
    runs = [ring(texts={"short": "x", "long": "y"}), ring("solo", 0, texts={"long": "y"})]
    runs.append(ring("upstream", texts={"short": "x", "long": "z"}))
    assert differing_texts(runs) == []
    assert (only(all_of([model()], runs), "single process").upstream) == "1 of 2"


def test_a_run_of_one_part_has_no_other_bars() -> None:
    assert all_of([model()], [ring()]) == []


def test_pushes_are_what_the_host_says_of_every_pair() -> None:
    log = "load\nmesh-push w1 w2\nmesh-push-fallback w2 w3 it is not reached\nmesh-push-lost 0 1 gone\n"
    pushes = pushes_of(log, ["w1", "w2", "w3", "w4"])
    assert pushes.made == ("w1 -> w2",)
    assert pushes.faults == ("w2 -> w3: it is not reached", "w3 -> w4: the host says nothing of it")
    assert pushes_of("", ["w1"]).faults == ()


def test_a_difference_is_to_the_neighbours_of_its_own_time() -> None:
    assert beside([10.0, 14.0, 30.0], [52.0, 70.0]) == [40.0, 48.0]


def test_a_workers_wire_is_summed_over_its_links() -> None:
    wire = {("a", "w1"): 10.0, ("a", "w2"): 4.0, ("w1", "w2"): 9.0, ("w2", "a"): 8.0}
    assert (to_worker(wire), from_worker(wire)) == (13.0, 9.0)
    assert to_worker({}) == 0.0


def test_bytes_per_token_are_what_a_longer_answer_costs_more() -> None:
    short, long = {("a", "w1"): 1000}, {("a", "w1"): 5000, ("w1", "w2"): 400}
    assert per_token(short, long, 4) == {("a", "w1"): 1000.0, ("w1", "w2"): 100.0}
    assert median_wire([{("a", "w1"): 1.0}, {("a", "w1"): 3.0}, {}]) == {("a", "w1"): 1.0}


# Whatever a word is worth, it is the shortest text that has the tokens.
@given(st.integers(1, 4), st.integers(1, 5000))
def test_a_prompt_has_hardly_more_tokens_than_wanted(per_word: int, tokens: int) -> None:
    words = words_for(lambda n: n * per_word, tokens)
    assert tokens <= words * per_word < tokens + per_word


def test_a_layout_names_machines_and_carries_every_layer(tmp_path: Path) -> None:
    write_demo(tmp_path / "m.gguf", small_vocab(tmp_path / "v.gguf"), preset="tiny")
    programs = Programs(Path("s"), Path("r"), tmp_path)
    layout = layout_of(Task(programs, programs, tmp_path / "m.gguf", 1, 512, tmp_path), [1, 2, 1])
    check_layers(layout)
    assert [worker.id for worker in layout.workers] == ["w1", "w2"]
    assert layout.workers[0].bytes > layout.workers[1].bytes > 0


def test_quick_leaves_what_was_said_outright() -> None:
    options = parse(["--quick", "--workers", "3"])
    assert (options.model, options.workers, options.runs) == (["noise-demo"], [3], 1)


def test_upstream_and_what_takes_long_is_measured_less_often() -> None:
    plan = Plan(parse_link("lan"), [1, 3], ["ring"], ["token"], runs=5, tokens=9)
    assert (plan.fewer, plan.fewest, plan.middle) == (3, 2, 3)


def test_the_tables_are_markdown_and_count_the_bars() -> None:
    visit = Visit("A", True, 12, 13, 1000, 2000, 0.5)
    run = ring(token=token([61.0]), loads=Loads([0.7], [5000]), visits=[visit], layers=[5, 5, 6])
    counted = ring(link="relayed", turns=Turns(8, 9, 1.0, 0.0))
    text = tables([model()], [run, counted])
    row = next(line for line in text.splitlines() if "5+5+6" in line)
    assert "| 9 " in row
    assert "every ring" in text
    assert bars(all_of([model()], [run, counted])).endswith("bars met")
