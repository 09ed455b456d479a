"""The loop on one process, against the same training written out in plain PyTorch."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from toys import MODELS, Adversarial, Regression, TensorRows, plainly_trained, rows

from gendist.noise import Noise
from gendist.protocols import Loss, UserError
from gendist.train.batches import noise
from gendist.train.config import DeepConfig
from gendist.train.ddp_engine import DdpEngine
from gendist.train.decisions import Decision, Progress
from gendist.train.ema import gamma_of_width
from gendist.train.loop import NotFinite, Report, train
from gendist.train.order import indices
from gendist.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
SEED = 3


def config(**changes) -> DeepConfig:
    optimizer = {"learning_rate": 0.01, **changes.pop("optimizer", {})}
    return DeepConfig.model_validate({"num_steps": 50, "global_batch_size": 12, "optimizer": optimizer, **changes})


def trained(model, config: DeepConfig, *, data=None, state=None, **options) -> tuple[list[Report], dict[str, torch.Tensor]]:
    engine = DdpEngine(ALONE, config)
    engine.prepare(model.networks(), state)
    reports = list(train(model, engine, data or rows(), config, SEED, **options))
    return reports, engine.state()


def parameters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "/param/" in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OPTIMIZERS = {
    "adam": {},
    "clipped": {"gradient_clipping": 0.3, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 5},
    "sgd": {"kind": "sgd", "gradient_clipping": 1.0},
}


@pytest.mark.parametrize(("optimizer", "micro_batch_size"), [
    ("adam", None), ("adam", 1), ("clipped", None), ("clipped", 4), ("sgd", 6),
])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_it_is_plain_training_whatever_the_micro_batches(name, optimizer, micro_batch_size):
    this = config(optimizer=OPTIMIZERS[optimizer], micro_batch_size=micro_batch_size)
    _, state = trained(MODELS[name](), this)
    *_, expected = plainly_trained(name, rows(), this, SEED)
    assert parameters(state).keys() == expected.keys()
    moved = 0
    start = {f"{network}/param/{key}": value for network, module in MODELS[name]().networks().items()
             for key, value in module.named_parameters()}  # fmt: skip
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0.0, atol=1e-6)
        moved += not torch.allclose(value, start[key], atol=1e-3)
    assert moved > len(expected) / 2


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_an_unbroken_one_to_the_byte(name):
    this = config(ema=0.1, checkpoint_every=20, optimizer={"gradient_clipping": 0.5, "schedule": "linear"})
    engine = DdpEngine(ALONE, this)
    model = MODELS[name]()
    engine.prepare(model.networks())
    for report in train(model, engine, rows(), this, SEED):
        if report.progress.step == 20:
            assert report.is_checkpoint_due
            half, progress = engine.state(), report.progress
    resumed, end = trained(MODELS[name](seed=5), this, state=half, progress=progress)
    assert resumed[-1].progress.step == 50
    assert same(end, engine.state())


def test_nothing_is_drawn_from_the_global_generator_and_it_stays_as_it_was():
    this, models = config(num_steps=5), (Adversarial(), Adversarial())
    ends = []
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        ends.append(trained(model, this)[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*ends)


class Dropping(Regression):
    """Its network draws from the global generator."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.network.append(torch.nn.Dropout(0.5))


def test_dropout_is_repeated_by_a_resumed_run_and_said_once(caplog):
    this = config(num_steps=30, micro_batch_size=4, checkpoint_every=10)
    with caplog.at_level(logging.WARNING):
        _, end = trained(Dropping(), this)
    assert caplog.text.count("draws random numbers of its own in the phase denoise") == 1
    engine = DdpEngine(ALONE, this)
    model = Dropping()
    engine.prepare(model.networks())
    report = next(report for report in train(model, engine, rows(), this, SEED) if report.progress.step == 10)
    half = engine.state()
    torch.manual_seed(99)
    _, resumed = trained(Dropping(seed=4), this, state=half, progress=report.progress)
    assert same(resumed, end)
    _, undropped = trained(Regression(), this)
    assert not torch.allclose(undropped["network/param/0.weight"], end["network/param/0.weight"], atol=1e-3)


def test_an_average_is_what_its_profile_says():
    this = config(num_steps=12, ema=0.15)
    _, state = trained(Regression(), this)
    steps = list(plainly_trained("regression", rows(), this, SEED))
    # Between steps t - 1 and t lies ((t / T)^(gamma + 1) - ((t - 1) / T)^(gamma + 1)) of the profile's area.
    power = gamma_of_width(0.15) + 1.0
    weights = [(t / 12) ** power - ((t - 1) / 12) ** power for t in range(1, 13)]
    for name in steps[0]:
        expected = sum(weight * step[name].double() for weight, step in zip(weights, steps, strict=True))
        torch.testing.assert_close(state[name.replace("/param/", "/ema/")].double(), expected, rtol=0.0, atol=1e-6)


def test_the_average_stands_in_for_the_parameters_and_goes_again():
    this, model = config(num_steps=12, ema=0.15), Regression()
    engine = DdpEngine(ALONE, this)
    engine.prepare(model.networks())
    for _ in train(model, engine, rows(), this, SEED):
        pass
    before = engine.state()
    with engine.averaged():
        inside = {f"network/ema/{name}": value.detach().clone() for name, value in model.network.named_parameters()}
    assert same(inside, {name: value for name, value in before.items() if "/ema/" in name})
    assert same(engine.state(), before)
    assert not torch.equal(before["network/param/0.weight"], before["network/ema/0.weight"])


def test_records_hold_means_over_their_steps_and_come_when_due():
    this = config(num_steps=25, record_every=10, checkpoint_every=12, eval_every=20, micro_batch_size=4)
    reports, _ = trained(Adversarial(), this)
    assert [report.progress.step for report in reports] == [10, 12, 20, 24, 25]
    assert [report.is_checkpoint_due for report in reports] == [False, True, False, True, True]
    assert [report.record["step"] for report in reports] == [10, 12, 20, 24, 25]
    single, _ = trained(Adversarial(), config(num_steps=25, record_every=1, micro_batch_size=4))
    for previous, report in zip([0, 10, 12, 20, 24], reports, strict=True):
        inside = [each.record for each in single[previous : report.progress.step]]
        for key, value in report.record.items():
            if "/" in key and not key.endswith("learning_rate"):
                values = [record[key] for record in inside if key in record]
                assert value == pytest.approx(sum(values) / len(values), rel=1e-5), key
        assert ("penalty/r1" in report.record) == any(step % 3 == 0 for step in range(previous, report.progress.step))
    assert reports[-1].record["stopped"] == Decision.NUM_STEPS.value
    assert "stopped" not in reports[-2].record
    json.dumps([report.record for report in reports], allow_nan=False)


def test_a_record_tells_the_loss_that_is_minimised():
    """Against the definition, at the parameters that the first step begins with."""
    this = config(num_steps=1, micro_batch_size=4)
    (report,), _ = trained(Regression(), this)
    model, data = Regression(), rows()
    batch = data.take(indices(data.num_rows, SEED, 0, 12))
    drawn = noise(SEED, "train.denoise", model.draws(model.phases(0)[0]), 0, 12)
    loss, counts = model.loss(model.phases(0)[0], batch, drawn, 0), model.counts(model.phases(0)[0], batch)
    means = {name: float(term.detach() / counts[name]) for name, term in loss.terms.items()}
    assert report.record["denoise/squared_error"] == pytest.approx(means["squared_error"])
    assert report.record["denoise/label"] == pytest.approx(means["label"])
    assert report.record["denoise/loss"] == pytest.approx(sum(means.values()))
    assert report.record["denoise/output"] == pytest.approx(float(loss.watched["output"].detach() / batch.weights.sum()))
    (loss.terms["squared_error"] / counts["squared_error"] + loss.terms["label"] / counts["label"]).backward()
    gradients = [parameter.grad for parameter in model.network.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert report.record["denoise/gradient_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_a_term_without_a_sample_counts_for_nothing():
    data = TensorRows(rows().x, rows().weights, torch.zeros(50, 3, dtype=torch.float64))
    reports, state = trained(Regression(), config(num_steps=3), data=data)
    assert reports[-1].record["denoise/label"] == 0.0
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_a_batch_without_weight_has_means_of_0():
    data = TensorRows(rows().x, torch.zeros(50, dtype=torch.float64), rows().evidence)
    (report,), _ = trained(Regression(), config(num_steps=1), data=data)
    assert report.record["denoise/output"] == report.record["denoise/squared_error"] == 0.0


def bad_rows(value: float) -> TensorRows:
    """Row 17 holds something that no loss can be made of."""
    data = rows()
    data.x[17, 2] = value
    return data


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_that_is_not_finite_stops_the_run_before_it_harms(name, value):
    data, model = bad_rows(value), MODELS[name]()
    order = indices(50, SEED, 0, 50).tolist()
    first = order.index(17) // 12
    engine = DdpEngine(ALONE, config(record_every=1, micro_batch_size=4))
    engine.prepare(model.networks())
    steps = []

    def watched() -> None:
        steps.extend(
            report.progress.step for report in train(model, engine, data, config(record_every=1, micro_batch_size=4), SEED)
        )

    # The hyperbolic tangent makes a finite loss of infinity, but no gradient.
    what = r"(denoise/squared_error|discriminator/logistic).* is (nan|inf)|the gradient of discriminator has the norm nan"
    message = rf"index {first}: .*({what}).*skip_batch"
    with pytest.raises(NotFinite, match=message) as raised:
        watched()
    assert raised.value.step == first
    assert steps == list(range(1, first + 1))
    assert all(bool(value.isfinite().all()) for value in engine.state().values())


@pytest.mark.parametrize("name", MODELS)
def test_a_skipped_batch_changes_nothing_is_recorded_and_is_skipped_again(name):
    this = config(num_steps=15, on_nan="skip_batch", ema=0.1, record_every=5, checkpoint_every=5, micro_batch_size=4)
    model, data = MODELS[name](), bad_rows(torch.nan)
    engine = DdpEngine(ALONE, this)
    engine.prepare(model.networks())
    bad = [step for step in range(15) if 17 in indices(50, SEED, 12 * step, 12).tolist()]
    whole = []
    for report in train(model, engine, data, this, SEED):
        whole.append(report)
        if report.progress.step == 5:
            half = engine.state()
    end = engine.state()
    skipped = [entry for report in whole for entry in report.record.get("skipped", [])]
    first_phase = model.phases(1)[0].name
    assert [entry["step"] for entry in skipped if entry["phase"] == first_phase] == bad
    assert all(bool(value.isfinite().all()) for value in end.values())
    network = model.phases(1)[0].network
    taken = sum(phase.network == network for step in range(15) for phase in model.phases(step))
    assert int(end[f"{network}/step"]) == taken - sum(entry["phase"] != "generator" for entry in skipped)
    resumed, again = trained(MODELS[name](seed=3), this, data=data, state=half, progress=whole[0].progress)
    assert same(again, end)
    assert [report.record.get("skipped") for report in resumed] == [report.record.get("skipped") for report in whole[1:]]
    json.dumps([report.record for report in whole], allow_nan=False)


def test_skipping_has_an_end():
    data = TensorRows(torch.full((50, 4), torch.nan), rows().weights, rows().evidence)
    with pytest.raises(NotFinite, match="50 batches in a row were skipped"):
        trained(Regression(), config(num_steps=100, on_nan="skip_batch"), data=data)


class Exploding(Regression):
    """A finite loss whose gradient is infinite: the square root at 0."""

    def loss(self, phase, batch, noise, step):
        loss = super().loss(phase, batch, noise, step)
        at_zero = (self.network[0].weight * 0.0).sum()
        return Loss({**loss.terms, "squared_error": loss.terms["squared_error"] + at_zero.sqrt()}, loss.watched)


def test_a_gradient_that_is_not_finite_is_told_from_a_loss():
    with pytest.raises(NotFinite, match="the gradient of denoise has the norm nan"):
        trained(Exploding(), config())


def test_validation_is_a_mean_over_the_rows_by_weight_with_the_averaged_networks():
    this = config(num_steps=10, eval_every=5, ema=0.1, micro_batch_size=4)
    model, held_out = Regression(), rows(31)
    engine = DdpEngine(ALONE, this)
    engine.prepare(model.networks())
    drawn = {"shift": Noise(SEED, "validation.shift").normal(0, 31, 4).float()}
    for report in train(model, engine, rows(), this, SEED, validation=held_out):
        with engine.averaged(), torch.no_grad():
            total = model.validate(held_out.take(torch.arange(31)), drawn)["squared_error"]
        expected = float(total / held_out.weights.sum())
        if report.progress.step % 5 == 0:
            assert report.record["validation/squared_error"] == pytest.approx(expected, rel=1e-6)
        assert model.network.training


class Worsening(Regression):
    """Its validation is the number of times that it was asked, from the fourth time on."""

    times = 0

    def validate(self, batch, noise):
        self.times += 1
        return {"squared_error": torch.tensor(float(max(self.times, 8 - self.times))) * batch.weights_or_ones().sum()}


def test_training_stops_early_and_tells_the_best():
    this = config(num_steps=100, eval_every=3, early_stopping=2, record_every=100, checkpoint_every=100, global_batch_size=50)
    reports, _ = trained(Worsening(), this, validation=rows(40))
    assert [report.record["validation/squared_error"] for report in reports] == [7.0, 6.0, 5.0, 4.0, 5.0, 6.0]
    assert [report.is_best for report in reports] == [True, True, True, True, False, False]
    assert [report.is_checkpoint_due for report in reports] == [True, True, True, True, False, True]
    assert reports[-1].decision is Decision.EARLY_STOPPING
    assert reports[-1].progress == Progress(18, best_step=12, best_value=4.0, num_no_better=2)
    assert reports[-1].record["stopped"] == Decision.EARLY_STOPPING.value


class Normalized(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.network.insert(1, torch.nn.BatchNorm1d(9))


class Contrastive(Regression):
    def needs_whole_batch(self, phase):
        return "each sample is compared with all others"


@pytest.mark.parametrize(("model", "message"), [
    (Normalized, r"network\.1 is a BatchNorm1d.* may not be divided; here it has 3 micro-batches on each of 1 processes"),
    (Contrastive, "each sample is compared with all others.* may not be divided"),
])  # fmt: skip
def test_what_needs_the_whole_batch_is_refused_where_it_is_divided(model, message):
    with pytest.raises(UserError, match=message):
        trained(model(), config(micro_batch_size=4))
    reports, _ = trained(model(), config(num_steps=2))
    assert reports[-1].progress.step == 2


@pytest.mark.parametrize(("changes", "message"), [
    ({"optimizers": {"netork": {}}}, "fit.optimizers: no network is called netork; there are network"),
    ({"precision": "float16"}, "float16 needs a GPU; allowed on a CPU are float32 and bfloat16"),
])  # fmt: skip
def test_a_mistake_in_the_spec_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        trained(Regression(), config(**changes))


def test_there_is_a_sample_for_every_process():
    engine = DdpEngine(Processes(0, 3, ALONE.device), config(global_batch_size=2))
    with pytest.raises(UserError, match="global_batch_size 2 is less than one sample for each of 3 processes"):
        next(train(Regression(), engine, rows(), config(global_batch_size=2), SEED))


def test_every_network_has_its_own_optimizer():
    this = config(num_steps=20, optimizers={"generator": {"kind": "sgd", "learning_rate": 1e-9}})
    reports, state = trained(Adversarial(), this)
    assert reports[-1].record["generator/learning_rate"] == 1e-9
    assert reports[-1].record["discriminator/learning_rate"] == 0.01
    assert not any(name.startswith("generator/exp_avg") for name in state)
    for name, value in Adversarial().generator.named_parameters():
        torch.testing.assert_close(state[f"generator/param/{name}"], value.detach(), rtol=0.0, atol=1e-6)


def test_what_the_user_has_frozen_stays_so():
    model = Regression()
    model.network[0].weight.requires_grad_(False)
    before = model.network[0].weight.clone()
    _, state = trained(model, config(num_steps=5, optimizer={"weight_decay": 0.1}))
    assert torch.equal(state["network/param/0.weight"], before)
    assert "network/exp_avg/0.weight" not in state
    assert not model.network[0].weight.requires_grad
    assert model.network[0].bias.requires_grad


def test_bfloat16_is_near_float32_and_keeps_parameters_in_float32():
    _, state = trained(Regression(), config(precision="bfloat16", micro_batch_size=4))
    _, exact = trained(Regression(), config(micro_batch_size=4))
    for name, value in parameters(exact).items():
        assert state[name].dtype == torch.float32
        torch.testing.assert_close(state[name], value, rtol=0.0, atol=0.05)
    assert not same(parameters(state), parameters(exact))


class Images(Regression):
    """Convolutions over the four features as an image of 2 x 2."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(seed)
        layers = torch.nn.Conv2d(1, 6, 2, padding=1), torch.nn.Conv2d(6, 7, 3)
        self.network = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 2, 2)), *layers, torch.nn.Flatten())
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_the_layout_of_images_changes_speed_alone():
    this = config(num_steps=20, channels_last=True, checkpoint_every=10, ema=0.1)
    model = Images()
    engine = DdpEngine(ALONE, this)
    engine.prepare(model.networks())
    for report in train(model, engine, rows(), this, SEED):
        if report.progress.step == 10:
            half, progress = engine.state(), report.progress
    assert model.network[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(value.is_contiguous() for value in half.values())
    _, plain = trained(Images(), config(num_steps=20, ema=0.1))
    for name, value in plain.items():
        torch.testing.assert_close(engine.state()[name], value, rtol=0.0, atol=1e-5)
    _, resumed = trained(Images(seed=5), this, state=half, progress=progress)
    assert same(resumed, engine.state())
