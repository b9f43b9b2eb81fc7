"""Benchmarks check values before they time, and compare times with baselines and the machine's rates."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from profiling import bench
from profiling.bench.__main__ import Options, chosen, measure_apart, run_all
from profiling.bench.case import OURS, Benchmark, Case, WrongResult, close_to
from profiling.bench.measure import ROTATED, Machine, check, join, measure
from profiling.common.setups import setup
from profiling.common.timing import rounds


def product(times):
    def run(x):
        for _ in range(times):
            y = x @ x
        return {"product": y}

    return run


def case(variants, **options):
    return Case(
        shape={"N": 256},
        dtype=torch.float32,
        inputs=lambda: (torch.randn(256, 256),),
        variants=variants,
        judge=close_to(product(1), 1e-4),
        bytes=options.pop("bytes", 2 * 256**2 * 4),
        flops=options.pop("flops", 2 * 256**3),
        **options,
    )


@pytest.fixture
def machine():
    """A machine whose rates are given."""
    idle = Machine("cpu", 0.0)
    idle.limits["float32"] = {"gbytes": 2.0, "gflops": 100.0}
    return idle


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_variant_is_described_and_one_is_ours(name):
    benchmark = bench.load(name)
    assert benchmark.name == name
    first = next(benchmark.cases("cpu"))
    others = set(first.variants) - {OURS}
    assert others < set(first.variants)
    assert others <= set(benchmark.against)
    assert any(not other.startswith(OURS) for other in others)


def test_a_wrong_variant_is_not_timed_and_neither_are_the_others(machine):
    calls = []

    def wrong(x):
        calls.append("wrong")
        return {"product": (x @ x) * 1.001}

    def right(x):
        calls.append("right")
        return product(1)(x)

    with pytest.raises(WrongResult, match=r"sloppy: product is off by 0\.001.*above 0\.0001; nothing was timed"):
        measure(case({"sloppy": wrong, OURS: right}), machine, 0.0)
    assert calls == ["wrong"]


def test_a_variant_that_returns_nothing_or_nan_is_wrong(machine):
    with pytest.raises(WrongResult, match="nothing that could be checked"):
        measure(case({OURS: lambda x: {}}), machine, 0.0)
    with pytest.raises(WrongResult, match="off by nan"):
        measure(case({OURS: lambda x: {"product": x @ x * float("nan")}}), machine, 0.0)


def test_ratios_pair_turns_and_the_slower_rate_is_the_floor(machine, monkeypatch):
    turns = {"eight": [8.0, 160.0, 8.0, 16.0, 24.0], OURS: [1.0, 20.0, 1.0, 2.0, 6.0]}  # the machine drifts
    monkeypatch.setattr("profiling.bench.measure.rounds", lambda runs, *_, **__: {name: turns[name] for name in runs})
    result = measure(case({"eight": product(8), OURS: product(1)}), machine, 0.0)
    eight, ours = result["variants"]["eight"], result["variants"][OURS]
    assert eight["times_ours"] == {"median": 8.0, "lower": 8.0, "upper": 8.0, "least": 4.0, "greatest": 8.0}
    assert set(ours["times_ours"].values()) == {1.0}
    assert ours["ms"] == {"median": 2.0, "lower": 1.0, "upper": 6.0, "least": 1.0, "greatest": 20.0}
    arithmetic, memory = 2 * 256**3 / 100e9 * 1e3, 2 * 256**2 * 4 / 2e9 * 1e3
    assert result["floor_ms"] == pytest.approx(max(arithmetic, memory))
    assert result["bound"] == "arithmetic"
    assert result["of_floor"] == pytest.approx(arithmetic / 2)
    assert result["of_copy"] == pytest.approx(memory / 2)
    assert result["gflops"] == pytest.approx(2 * 256**3 / 2 / 1e6)
    assert ours["peak_mib"] == pytest.approx(0.25, rel=0.1)
    more = measure(case({OURS: product(1)}, bytes=10**9), machine, 0.0)
    assert (more["bound"], more["floor_ms"]) == ("memory", pytest.approx(500))


def test_variants_take_turns_five_times_at_least():
    order: list[str] = []
    times = rounds({name: partial(order.append, name) for name in "ab"}, "cpu", 0.0, warm_up=1)
    assert order == ["a", "b"] + ["a", "b"] * 5
    assert {name: len(t) for name, t in times.items()} == {"a": 5, "b": 5}


def test_operations_are_counted_where_no_formula_is_given(machine):
    assert measure(case({OURS: product(3)}, flops=None), machine, 0.0)["flops"] == 3 * 2 * 256**3


def test_inputs_rotate_through_more_memory_than_a_cache_holds(machine, monkeypatch):
    monkeypatch.setitem(ROTATED, "cpu", 6 * 256 * 256 * 4)
    seen = []

    def noting(x):
        seen.append(x.data_ptr())
        return product(1)(x)

    assert measure(case({OURS: noting}), machine, 0.0)["copies"] == 6
    timed = seen[-5:]
    assert len(set(timed)) == 5
    assert len(set(seen)) == 6


def test_a_failed_benchmark_leaves_the_other_results(monkeypatch):
    monkeypatch.setitem(bench.BENCHMARKS, "gone", "no_such_file")
    threads = torch.get_num_threads()
    try:
        results = run_all(("gone", "propagate_attention"), Options(device="cpu", seconds=0.0, threads=1))
    finally:
        torch.set_num_threads(threads)
    assert results["failed"].keys() == {"gone"}
    assert "no_such_file" in results["failed"]["gone"]
    (result,) = results["benchmarks"]["propagate_attention"]["cases"]
    assert result["backends"] == {"propagate_attention": "reference"}
    assert result["variants"].keys() == {"matmul", "matmul compiled", OURS}
    assert 0 < max(result["variants"]["matmul"]["errors"].values()) < 1e-5
    assert results["threads"] == 1
    assert {"torch", "python"} <= results["versions"].keys()
    assert results["commit"]
    assert results["limits"].keys() == {"float32"}
    json.dumps(results)


def test_names_are_chosen_by_their_beginnings():
    names = ("sinkhorn_divergence", "sinkhorn_streaming", "sinkhorn_plan", "merge_slots")
    assert chosen(("sinkhorn", "merge")) == names
    assert chosen(()) == tuple(bench.BENCHMARKS)
    with pytest.raises(
        ValueError, match=r"--only nothing: no benchmark has a name that begins with this, choose from slot_attention,"
    ):
        chosen(("merge", "nothing"))


def test_names_keep_the_order_of_the_command_line():
    assert chosen(("merge", "sinkhorn_d")) == ("merge_slots", "sinkhorn_divergence")


def test_variants_are_chosen_and_left_out_ones_are_listed(machine):
    three = {"other": product(1), OURS: product(1), f"{OURS} twice": product(2)}
    ours = measure(case(three), machine, 0.0, ("ours",))
    assert list(ours["variants"]) == [OURS, f"{OURS} twice"]
    assert ours["left_out"] == {"other": "not asked for with --variants"}
    one = measure(case(three), machine, 0.0, (f"{OURS} twice",))
    assert list(one["variants"]) == [f"{OURS} twice"]
    assert "of_floor" not in one
    assert "of_floor" not in measure(case(three), machine, 0.0, (OURS,), with_floor=False)


def test_a_check_compares_values_and_times_nothing():
    result = check(case({OURS: product(1)}), (torch.randn(256, 256),))
    assert result["variants"][OURS].keys() == {"errors", "first_call_s"}
    with pytest.raises(WrongResult):
        check(case({OURS: lambda x: {"product": x}}), (torch.randn(256, 256),))


def test_one_wrong_element_fails_unless_the_norm_is_judged():
    def spoilt(x):
        product = x @ x
        product[0, 0] += 0.01 * product.abs().max()
        return {"product": product}

    x = torch.randn(256, 256)
    with pytest.raises(WrongResult, match="of its largest value"):
        close_to(product(1), 1e-3)(x)(spoilt(x))
    assert close_to(product(1), 1e-3, norm=("prod",))(x)(spoilt(x))["product"] < 1e-3
    with pytest.raises(WrongResult, match="of its norm"):
        close_to(product(1), 1e-6, norm=("prod",))(x)(spoilt(x))


def test_joined_variants_are_divided_by_our_median():
    def result(name, *times):
        spread = dict(zip(("median", "lower", "upper", "least", "greatest"), times, strict=True))
        return {"rounds": 5, "seconds": 1.0, "variants": {name: {"ms": spread}}}

    joined = join(
        [
            result("other", 8.0, 6.0, 9.0, 5.0, 10.0),
            {
                **result(OURS, 2.0, 1.0, 3.0, 1.0, 4.0),
                "of_floor": 0.5,
                "left_out": {"other": "not asked for", "third": "-"},
            },
        ]
    )
    assert joined["left_out"] == {"third": "-"}
    assert joined["variants"]["other"]["times_ours"]["median"] == 4.0
    assert joined["variants"][OURS]["times_ours"] == {
        "median": 1,
        "lower": 0.5,
        "upper": 1.5,
        "least": 0.5,
        "greatest": 2,
    }
    assert (joined["of_floor"], joined["seconds"]) == (0.5, 2.0)


def test_joined_variants_need_ours_to_compare_with():
    other = {"rounds": 5, "seconds": 1.0, "variants": {"other": {"ms": {"median": 1.0}}}}
    with pytest.raises(ValueError, match=f"--variants other: add {OURS}"):
        join([other])


def test_a_case_can_time_each_variant_in_its_own_process():
    options = Options(device="cpu", seconds=0.0, threads=1, variants=("ours",))
    first = next(bench.load("cluster_slots").cases("cpu"))
    result = measure_apart("cluster_slots", 0, first, options)
    assert list(result["variants"]) == [f"{OURS} reference", OURS]
    assert result["variants"][f"{OURS} reference"]["times_ours"]["median"] > 1
    assert result["of_floor"] > 0
    with pytest.raises(RuntimeError, match=f"{OURS}: there is no result"):
        measure_apart("cluster_slots", 9, first, Options(device="cpu", seconds=0.0, threads=1, variants=(OURS,)))


def test_training_steps_run_apart_on_a_gpu_only(monkeypatch):
    from profiling.bench import training

    assert not next(training.TRAIN_IMAGE.cases("cpu")).apart
    monkeypatch.setattr(training, "repeatable", lambda device: None)
    monkeypatch.setattr(training, "setup", lambda stage, *_, **__: setup(stage, "demo", torch.device("cpu")))
    on_gpu = next(training.TRAIN_IMAGE.cases("cuda"))
    assert on_gpu.apart
    assert f"{OURS} compiled and captured" in on_gpu.variants


def test_finished_cases_survive_one_that_dies(monkeypatch, tmp_path):
    def cases(device):
        yield case({OURS: product(1)})
        raise KeyboardInterrupt  # as a time limit would end it

    benchmark = Benchmark("cut", "a product", {}, cases)
    monkeypatch.setitem(bench.BENCHMARKS, "cut", "file")
    monkeypatch.setattr("profiling.bench.__main__.load", lambda name: benchmark)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run_all(("cut",), Options(device="cpu", seconds=0.0, threads=1, out=tmp_path / "results.json"))
    torch.set_num_threads(threads)
    saved = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["cut"]
    assert not saved["finished"]
    assert len(saved["cases"]) == 1


def test_baselines_of_numpy_run_on_as_many_threads_as_ours():
    np.ones((8, 8)) @ np.ones((8, 8))  # loads its library
    before = torch.get_num_threads()
    try:
        with threadpool_limits():  # the end of this block restores the process
            assert run_all((), Options(device="cpu", threads=1))["threads"] == 1
            assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
    finally:
        torch.set_num_threads(before)
