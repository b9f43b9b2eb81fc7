"""The cost model: its formulas against PyTorch's counts, the size of a cache, figures of docs/results/scaling.md."""

import json
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from interpreter.engine.memory import predicted_peak
from interpreter.engine.step import TrainingStep
from interpreter.methods.interpreter.config import ImageModelConfig
from interpreter.methods.interpreter.image_slots import SlotMaker
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.store.features import FeatureMaker
from profiling import cost
from profiling.accounting import formulas
from profiling.accounting.counts import branches_of_a_gpu
from profiling.accounting.formulas import Part
from profiling.common.paths import ROOT
from profiling.common.setups import configs, random_backbone, setup
from profiling.cost import Device, Options, predict, report, seconds

CPU = torch.device("cpu")
MEASURED = [(*one, stage) for one in (("ytvis19", "h200"), ("demo", "this-cpu")) for stage in ("image", "video")]
MEASURED.append(("ytvis19", "h100", "video"))
OWN = ("slot attention", "loss")  # products inside the project's own ops, which PyTorch's counter does not see


def counted(stage_setup):
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        step = TrainingStep(stage_setup.task, stage_setup.task.optim, CPU)
        step.start(0, {})
        step._compute(*(torch.empty(shape) for shape in stage_setup.shapes))
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", ["image", "video"])
@pytest.mark.parametrize("preset", ["demo", "ytvis19"])
def test_operations_are_those_that_pytorch_counts(stage, preset):
    stage_setup, (image, video) = setup(stage, preset, CPU, batch_size=2), configs(preset)
    parts = formulas.image_step(image, 2, 0) if stage == "image" else formulas.video_step(video, image, 2, 0)
    assert sum(part.flops for part in parts if part.name not in OWN) == pytest.approx(counted(stage_setup), rel=2e-3)


def test_operations_of_a_vit_are_those_that_pytorch_counts():
    image, _ = configs("davis")  # up to block 8 of a small one
    image = replace(image, data=replace(image.data, frame_size=(56, 84)))
    backbone = random_backbone(image.backbone, CPU)
    # PyTorch's counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.features(torch.zeros(2, 56, 84, 3, dtype=torch.uint8))
    flops = sum(part.flops for part in formulas.backbone(image, 2))
    assert flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("flip", [True, False])
def test_cache_is_as_large_as_what_the_cache_writes(flip, tmp_path):
    image, video = configs("demo")
    image = replace(image, optim=replace(image.optim, flip=flip), model=replace(ImageModelConfig(), num_slots=5))
    backbone = random_backbone(image.backbone, CPU)
    maker = FeatureMaker(tmp_path, backbone, image.backbone, image.data.frame_size, "fp32", "fp16", flip)
    stage = ImageStage(image.model, backbone.dim, backbone.grid(image.data.frame_size))
    slots = SlotMaker(tmp_path, maker, stage, "w", video.draws, video.model.inputs)
    frames = 1000
    written = [sum(store.num_bytes("0" * 32, frames) for store in one.stores.values()) for one in (maker, slots)]
    predicted = [frames * size for size in formulas.cache_bytes(image, video)]
    assert predicted == pytest.approx(written, rel=1e-4)  # but for the headers
    assert all(p < w for p, w in zip(predicted, written, strict=True))


def test_a_part_takes_the_longer_of_operations_and_bytes():
    options = Options(mfu=0.5, bandwidth_use=0.5)
    device = Device("", tflops=2.0, tflops_single=0.5, gbytes=100.0, memory=0.0, link=0.0, source="")
    assert seconds(Part("a", 4e12, 1e9), device, options) == pytest.approx(4.0)
    assert seconds(Part("a", 4e12, 1e12), device, options) == pytest.approx(20.0)
    assert seconds(Part("a", 4e12, 0, single=True), device, options) == pytest.approx(16.0)


def test_gpus_share_rows_and_pay_for_the_exchange(monkeypatch):
    monkeypatch.setattr(cost, "_model", lambda stage, preset, rows, on_gpu: (10**10, rows))
    options = Options()
    one, eight = predict("image", 1, options), predict("image", 8, options)
    assert (one.rows, eight.rows, one.exchange) == (128, 16, 0)
    gradients = 2 * 7 / 8 * 4e10 / 450e9
    assert eight.exchange == pytest.approx(gradients - (eight.seconds - eight.exchange) * 2 / 3)
    assert "48 of 64" in report(replace(options, gpus=(64,)))


def test_a_step_is_no_shorter_than_its_launches(monkeypatch):
    monkeypatch.setattr(cost, "_model", lambda stage, preset, rows, on_gpu: (1, rows))
    launches = cost._kernels("image")
    assert launches > 100
    assert predict("image", 1, Options(preset="demo", kernel_us=1000)).seconds == pytest.approx(launches * 1e-3)


def test_memory_is_that_of_a_step_and_excess_is_reported(monkeypatch):
    stage_setup = setup("image", "demo", CPU)
    with branches_of_a_gpu():
        needed = predicted_peak(stage_setup.task)
    assert predict("image", 1, Options(preset="demo")).memory == needed
    monkeypatch.setattr(cost, "_model", lambda stage, preset, rows, on_gpu: (1, 81 * 10**9))
    assert "81, of 80: --micro-batch or --recompute" in report(Options(preset="demo"))
    assert "--micro-batch" not in report(Options(preset="demo", gpu="h200"))


def test_a_measurement_is_shown_with_the_prediction_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_model", lambda stage, preset, rows, on_gpu: (1, 1))
    options = Options(preset="demo", gpu="this-cpu")
    text, found = report(options), cost.measured("image", options)
    assert found is not None
    predicted, error = cost.error_of("image", options, found)
    assert error == pytest.approx(predicted / found.seconds - 1)
    assert f"{found.seconds * 1e3:.1f} ms {found.mode}" in text
    assert f"prediction of it {error:+.0%}" in text
    assert text.startswith("**Predicted, not measured**")

    step = {"device": "NVIDIA H100 80GB HBM3", "preset": "ytvis19", "milliseconds": {"median": 50}}
    save(tmp_path / "steps-cuda.json", {"steps": {"image compiled-captured": step}})
    monkeypatch.setattr(cost, "RESULTS", tmp_path)
    assert cost.measured("image", Options()) == ("compiled-captured", 0.05, True, "steps-cuda.json")
    assert cost.measured("image", Options(gpu="a100")) is None
    assert cost.measured("image", Options(preset="movi-e")) is None
    assert cost.measured("video", Options()) is None
    save(tmp_path / "steps-cuda.json", {"steps": {"image compiled-captured": step | {"decoder": "shared"}}})
    assert cost.measured("image", Options()) == ("compiled-captured", 0.05, False, "steps-cuda.json")
    case = {"variants": {"slotkernels compiled and captured": {"ms": {"median": 200}}}}
    benchmarks = {"train_video": {"against": {"textbook": ""}, "cases": [case]}}
    save(tmp_path / "bench-one-cuda.json", {"device": "NVIDIA H100 80GB HBM3", "benchmarks": benchmarks})
    assert cost.measured("video", Options()) == ("compiled-captured", 0.2, True, "bench-one-cuda.json")


def save(path, content):
    path.write_text(json.dumps(content))


def test_a_step_of_the_textbook_is_predicted_to_take_longer(monkeypatch):
    monkeypatch.setattr(cost, "_model", lambda stage, preset, rows, on_gpu: (1, 1))
    for stage in ("image", "video"):  # docs/results/scaling.md: what samples share is 10 to 20 % of a step
        ours, textbook = (predict(stage, 1, Options(), form).seconds for form in (False, True))
        assert 0.8 < ours / textbook < 0.95


def test_a_cpu_also_pays_for_each_start(monkeypatch):
    monkeypatch.setattr(cost, "_model", lambda stage, preset, rows, on_gpu: (1, 1))
    options = Options(preset="demo", gpu="this-cpu")
    before = predict("image", 1, options).seconds
    recording = cost._on_cpu()
    recording["limits"]["start_us"] += 1000
    monkeypatch.setattr(cost, "_on_cpu", lambda: recording)
    kernels = next(entry["kernels"] for entry in recording["entries"] if entry["stage"] == "image")
    assert kernels > 50
    assert predict("image", 1, options).seconds - before == pytest.approx(kernels * 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mfu": 0.0}, "--mfu must lie in"),
        ({"bandwidth_use": 1.5}, "--bandwidth-use must lie in"),
        ({"videos": 0}, "--videos must be at least 1"),
        ({"gpus": (0,)}, "--gpus must be 1 or more, got"),
        ({"gpu": "this-cpu", "gpus": (2,)}, "leave --gpus out"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        report(Options(**options))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "gpu", "stage"), MEASURED)
def test_page_states_how_far_the_predictions_are_off(preset, gpu, stage):
    page = (ROOT / "docs" / "results" / "scaling.md").read_text()
    row = cost.error_row(preset, gpu, stage)
    assert row in page, f"docs/results/scaling.md lacks: {row}"
