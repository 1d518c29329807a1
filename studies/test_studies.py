"""The studies: each test states what it shows. `pytest -q` at the top of the project runs these and test_empg.py."""

# ruff: noqa: F811 - the argument of a test has the name of a fixture, which is imported

import doctest
import functools
import json
import math
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import ablations
import behaviours
import ema_pg
import grpo
import importance
import svrg
import tables
import word_problems

import empg
from test_empg import (  # noqa: F401 - pytest finds the fixtures by their names
    ADVANTAGES,
    MASK,
    PIECES_TO_COPY,
    RIGHT,
    TRAJECTORIES,
    all_groups,
    check_kl_term,
    config,
    figures,
    files_in,
    flat,
    flat_grad,
    gradient,
    load,
    make_model,
    mean_and_variance,
    metrics,
    objective,
    odd_is_right,
    options,
    plain_logprobs,
    probabilities,
    refuses,
    results,
    rows_with,
    same_gradient,
    same_run,
    save,
    spy,
    tiny,
    toy_logits,
    toy_logprobs,
    write_rows,
)


@pytest.fixture(autouse=True)
def pieces_come_back(monkeypatch):
    """Studies replace functions of empg.py. After each test they are put back."""
    for name in (
        "smooth_rewards",
        "subtract_baseline",
        "micro_batch_loss",
        "response_logits",
        "micro_batches",
        "update",
        "METHOD",
    ):
        monkeypatch.setattr(empg, name, getattr(empg, name))
    for name in list(empg.TASKS):
        monkeypatch.setitem(empg.TASKS, name, empg.TASKS[name])


@pytest.mark.parametrize("module", [grpo, ablations, importance, ema_pg])
def test_examples_in_docstrings(module):
    """What the docstrings show is what the functions return."""
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    "replace",
    [
        grpo.replace,
        functools.partial(importance.replace, "clipped"),
        functools.partial(ablations.replace, "none", "loo", False),
        functools.partial(ema_pg.replace, "k3", k=0),
        functools.partial(svrg.replace, 4, True),
    ],
    ids=["grpo", "importance", "ablations", "ema_pg", "svrg"],
)
def test_a_run_is_not_taken_up_by_another_method(replace, tiny, tmp_path, capfd, odd_is_right):
    """A study does not go on with a run of empg.py, and loses nothing of it."""
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0))
    before = files_in(tmp_path)
    replace()
    refuses(capfd, empg.main, options(tiny, tmp_path, "--resume"), "--output", "begun with {'method': 'EMPG'}")
    assert files_in(tmp_path) == before


# ------------------------------ grpo.py ------------------------------


@pytest.mark.parametrize("clip", [0.2, 1e9])
def test_grpo_is_the_formula_of_deepseekmath(clip):
    """Advantages, loss and gradient equal DeepSeekMath's equation, written out in loops over samples and tokens."""
    rewards = torch.tensor([[0.0, 1, 1, 0, 0], [0.3, 0.3, 0.3, 0.3, 0.3], [5, -1, 0, 2.5, 1]], dtype=torch.float64)
    lengths = [1 + i % 4 for i in range(15)]
    mask = torch.tensor([[1.0] * length + [0.0] * (4 - length) for length in lengths], dtype=torch.float64)
    logprobs = toy_logits(0, (15, 4))
    old_logprobs = logprobs.detach() + 0.3 * toy_logits(1, (15, 4)).detach()

    expected = 0.0
    for i, length in enumerate(lengths):
        prompt, sample = divmod(i, 5)
        group = rewards[prompt].numpy()
        advantage = (group[sample] - group.mean()) / (group.std() + 1e-6)
        for t in range(length):
            ratio = torch.exp(logprobs[i, t] - old_logprobs[i, t])
            clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
            expected = expected - torch.minimum(ratio * advantage, clipped * advantage) / length / 15
    advantages = grpo.grpo_advantages(rewards)
    assert (advantages[1] == 0).all()
    loss = grpo.grpo_loss(logprobs, old_logprobs, mask, advantages.flatten(), clip)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(expected, logprobs))


@pytest.mark.parametrize("weigh", [functools.partial(ablations.baseline, kind="group"), grpo.grpo_advantages])
def test_equal_rewards_have_advantage_0_to_the_last_bit(weigh):
    """With the group's mean and with GRPO, too, equal rewards of a prompt give advantages of exactly 0."""
    for num_samples in range(2, 33):
        rewards = torch.full((2, num_samples), 0.6224593)
        rewards[1, 0] = 0.3775407
        advantages = weigh(rewards)
        assert (advantages[0] == 0).all()
        assert (advantages[1] != 0).all()


def test_grpo_keeps_the_log_probabilities_under_the_old_policy(tiny, tmp_path, odd_is_right, monkeypatch):
    """grpo.py trains with its own loss, to which the second update gives the first one's log-probabilities as the old
    ones."""
    calls = []
    spy(monkeypatch, "grpo_loss", lambda args, *_: calls.append((args[0].detach(), args[1])), grpo)
    grpo.replace()
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0, updates=2))
    (first, first_old), (second, second_old) = calls
    assert torch.equal(first, first_old)
    assert torch.equal(first_old, second_old)
    assert not torch.equal(second, second_old)


# ------------------------------ ablations.py ------------------------------


# With one prompt, the batch is its group. So "batch" has the factor of "group" here.
@pytest.mark.parametrize(("kind", "factor"), [("none", 1), ("loo", 1), ("group", 2 / 3), ("batch", 2 / 3)])
def test_a_mean_with_the_response_in_it_shrinks_the_gradient(kind, factor):
    """By summing over all groups of three samples, the expected gradient is the policy gradient with leave-one-out and
    without a baseline, and (G-1)/G of it with a mean that has τ in it."""
    logits = toy_logits(3)
    smoothed = 0.3 + 0.5 * RIGHT

    def advantages_of(sampled):
        return ablations.baseline(smoothed[sampled][None], kind)[0]

    expected, _ = mean_and_variance(list(all_groups(logits, advantages_of)))
    policy_gradient = gradient(objective(logits, smoothed), logits)
    torch.testing.assert_close(expected, factor * policy_gradient, rtol=1e-10, atol=1e-12)


def test_baselines():
    """loo subtracts the mean of the prompt's other samples, group the prompt's mean, batch the mean of everything."""
    rewards = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ablations.baseline(rewards, "loo"), empg.subtract_baseline(rewards))
    torch.testing.assert_close(ablations.baseline(rewards, "group"), rewards - rewards.mean(1, keepdim=True))
    torch.testing.assert_close(ablations.baseline(rewards, "batch"), rewards - rewards.mean())
    assert torch.equal(ablations.baseline(rewards, "none"), rewards)
    with pytest.raises(ValueError, match="choose loo"):
        ablations.baseline(rewards, "mean")


def test_ablations_replace_three_pieces(tiny, tmp_path, odd_is_right):
    """ablations.py trains without smoothing, with another baseline and with graded rewards."""
    ablations.replace("none", "batch", True)
    assert empg.smooth_rewards(torch.tensor([5.0])) == 5
    weights = empg.subtract_baseline(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert weights.tolist() == [[0.75, -0.25], [-0.25, -0.25]]
    assert [ablations.graded(text, "9") for text in ("#7", "9", "?")] == [-2, 0, -36]
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0))
    assert metrics(tmp_path)[0]["reward"] < 0


def test_the_measured_variance_is_that_of_gradients(tiny, odd_is_right, capsys, monkeypatch):
    """`ablations.py --measure` prints the variance of the gradient over batches, relative to its mean, for each
    baseline: by hand for the rewards as they are, and with the group's mean it is that of leave-one-out."""
    seen = []
    spy(monkeypatch, "gradient", lambda args, _, found: seen.append(found), ablations)
    ablations.measure(tiny, seeds=1, batches=4, P=6, G=4)
    printed = dict(re.findall(r"baseline (\w+) .*? ([\d.]+) ±", capsys.readouterr().out))
    assert list(printed) == ["loo", "group", "batch", "none"]
    gradients = torch.stack(seen[3::4])  # of each batch, the last one
    mean = gradients.mean(dim=0)
    variance = (gradients - mean).square().sum() / 3
    assert float(printed["none"]) == pytest.approx((variance / mean.square().sum()).item(), abs=6e-4, rel=1e-3)
    assert printed["loo"] == printed["group"]


# ------------------------------ importance.py ------------------------------


def test_importance_weights_are_exact_at_any_distance():
    """Enumerated, samples of θ* weighted by P_θ(τ)/P_θ*(τ) give the policy gradient of a θ far from it, and EMPG's do
    not."""
    logits = toy_logits(5)
    logprobs = toy_logprobs(logits)
    old_logprobs = toy_logprobs(toy_logits(6)).detach()
    # The mean over the seven trajectories is then the expectation under θ*.
    weights = len(TRAJECTORIES) * probabilities(toy_logits(6)).detach() * RIGHT
    policy_gradient = gradient(objective(logits, RIGHT), logits)
    weighted = -gradient(importance.trajectory_loss(logprobs, old_logprobs, MASK, weights), logits)
    torch.testing.assert_close(weighted, policy_gradient)
    without = -gradient(empg.empg_loss(logprobs, MASK, weights), logits)
    assert (without - policy_gradient).norm() > 0.1 * policy_gradient.norm()


@pytest.mark.parametrize("loss", importance.LOSSES.values())
def test_importance_weights_change_nothing_at_the_first_update(loss):
    """Where θ = θ*, the gradient with importance weights, whole or clipped, is EMPG's."""
    logits = toy_logits(5)
    logprobs = toy_logprobs(logits)
    weights = RIGHT - 0.4
    weighted = gradient(loss(logprobs, logprobs.detach(), MASK, weights), logits)
    torch.testing.assert_close(weighted, gradient(empg.empg_loss(logprobs, MASK, weights), logits))


def test_beyond_the_clip_there_is_no_gradient():
    """A token that has become much likelier has no more gradient if its weight is positive, and still has it if
    negative."""
    logits = toy_logits(5)
    logprobs = toy_logprobs(logits)
    old_logprobs = logprobs.detach() - 0.5  # every ratio is 1.65
    weights = torch.ones(len(TRAJECTORIES))
    assert (gradient(importance.clipped_loss(logprobs, old_logprobs, MASK, weights), logits) == 0).all()
    assert (gradient(importance.clipped_loss(logprobs, old_logprobs, MASK, -weights), logits) != 0).any()


@pytest.mark.parametrize("kind", importance.LOSSES)
def test_importance_weights_are_1_at_the_first_update_only(kind, tiny, tmp_path, odd_is_right, monkeypatch):
    """importance.py trains with ratios that are 1 at the first update on a batch, and not at the second."""
    distances = []
    note = lambda args, *_: distances.append((args[0] - args[1]).abs().max().item())
    spy(monkeypatch, f"{kind}_loss", note, importance)
    monkeypatch.setitem(importance.LOSSES, kind, getattr(importance, f"{kind}_loss"))
    importance.replace(kind)
    empg.main(options(tiny, tmp_path, steps=1, eval_every=0, updates=2))
    first, second = distances
    assert first == 0
    assert second > 0


@pytest.fixture
def runs_of_studies(tmp_path):
    """The directories of three runs, of which two are seeds of one setting."""
    for name, tokens, last in (("none-2-0", 4.0, 0.5), ("none-2-1", 5.0, 0.7), ("clipped-4-0", 4.0, 0.9)):
        iteration = {"reward": 0.3, "response_tokens": tokens, "kl": None, "step_seconds": 2.0}
        rows = [{"step": 0, "eval_accuracy": 0.1}]
        for step in range(1, 31):
            rows.append({"step": step, **iteration})
            if step in (10, 20, 30):
                accuracy = {10: 0.4, 20: 0.3, 30: last}[step]
                rows.append({"step": step, "eval_accuracy": accuracy})
        write_rows(tmp_path / name, metrics=rows)
        (tmp_path / name / "config.json").write_text(json.dumps({"steps": 30}))
    return sorted(str(path) for path in tmp_path.iterdir())


def test_the_picture_of_importance_weights(runs_of_studies, figures, tmp_path, capfd):
    """importance.py draws accuracy against updates, a line for each kind of weights, and refuses runs of other
    names."""
    importance.draw(str(tmp_path / "picture.png"), runs_of_studies)
    for axis, accuracies in zip(figures[0].axes, ((0.4, 0.4), (0.9, 0.6)), strict=True):
        lines = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines}
        assert lines == {
            "clipped": ([4], pytest.approx([accuracies[0]])),
            "none": ([2], pytest.approx([accuracies[1]])),
        }
    refuses(capfd, lambda runs: importance.draw("picture.png", runs), ["run"], "--draw run", "KIND-UPDATES-SEED")


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_what_is_missing_without_importance_weights(tiny, tmp_path, odd_is_right, capsys):
    """After 0 updates `importance.py --measure` finds weights of 1 and equal gradients, and later other ones."""
    importance.measure(str(tmp_path / "picture.png"), tiny, seeds=1, updates=2, P=8, G=8)
    assert is_picture(tmp_path / "picture.png")
    printed = capsys.readouterr().out
    assert "after  0 updates: KL 0.000  ESS 1.000  cosine 1.000  norm ratio 1.000" in printed
    assert re.search(r"after  2 updates: KL 0\.\d+  ESS 0\.9\d+  cosine 0\.\d+", printed)
    assert importance.effective_sample_size(torch.tensor([1000.0, 0, 0, 0])) == pytest.approx(0.25)


# ------------------------------ ema_pg.py ------------------------------


def test_k3_has_the_value_of_the_reverse_kl_and_the_gradient_of_the_forward_kl():
    """The expectation of k3 under π is KL(π ‖ ref), but its gradient, as a plain loss, is that of KL(ref ‖ π)."""
    logits = toy_logits(7, (5,))
    log_ref = toy_logits(8, (5,)).detach().log_softmax(0)
    log_pi = logits.log_softmax(0)
    reverse_kl = (log_pi.exp() * (log_pi - log_ref)).sum()
    forward_kl = (log_ref.exp() * (log_ref - log_pi)).sum()
    k3 = ema_pg.kl_k3(log_pi, log_ref)
    assert (k3 >= 0).all()
    assert (ema_pg.kl_k3(log_ref, log_ref) == 0).all()
    assert (log_pi.exp() * k3).sum().item() == pytest.approx(reverse_kl.item(), abs=1e-12)
    gradient_as_loss = gradient((log_pi.exp().detach() * k3).sum(), logits)
    torch.testing.assert_close(gradient_as_loss, gradient(forward_kl, logits))


@pytest.mark.parametrize("k", [0, 1, 2, 4, 8])
def test_topk_kl_is_exact_in_value_and_gradient(k):
    """Enumerated over 8 tokens, kl_topk has on average the KL's value and gradient, at every k."""
    logits = toy_logits(0, (8,))
    ref_logits = toy_logits(9, (8,)).detach()
    pi = logits.softmax(-1)
    kl = (pi * (pi.log() - ref_logits.log_softmax(-1))).sum()
    each_token = torch.arange(8)
    estimates = ema_pg.kl_topk(logits.expand(8, 8), ref_logits.expand(8, 8), each_token, k)
    mean = (pi.detach() * estimates).sum()
    torch.testing.assert_close(mean, kl)
    torch.testing.assert_close(gradient(mean, logits), gradient(kl, logits), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("k", "missing"), [(0, 0), (1, 0.6), (4, 0.4), (11, 0.04), (12, 0)])
def test_mistake_logarithm_of_the_tail_detached(k, missing):
    """With the tail's logarithm detached, as in released code, the KL keeps its value, but its expected gradient loses
    that of the tail's probability: nothing at k = 0 and 12, more than half of the gradient at k = 1."""
    each_token = torch.arange(12)
    shares = []
    for seed in range(20):
        logits = toy_logits(seed, (12,))
        ref_logits = toy_logits(100 + seed, (12,)).detach()
        pi = logits.softmax(-1)
        arguments = logits.expand(12, 12), ref_logits.expand(12, 12), each_token, k
        right = ema_pg.kl_topk(*arguments)
        mistaken = ema_pg.kl_topk_detached(*arguments)
        torch.testing.assert_close(right, mistaken)
        right_gradient = gradient((pi.detach() * right).sum(), logits)
        mistaken_gradient = gradient((pi.detach() * mistaken).sum(), logits)
        # At k = 0 the tail is everything, at k = 12 nothing. Then its probability is always 1, or 0.
        tail_probability = 1 - pi.topk(k).values.sum()
        is_constant = k in (0, 12)
        lost = torch.zeros(12, dtype=torch.float64) if is_constant else gradient(tail_probability, logits)
        torch.testing.assert_close(right_gradient - mistaken_gradient, lost, rtol=1e-9, atol=1e-12)
        shares.append((lost.norm() / right_gradient.norm()).item())
    assert np.mean(shares) == pytest.approx(missing, abs=0.03 if k == 11 else 0.1)


def test_the_measured_errors_of_estimators(tmp_path, capsys):
    """By `ema_pg.py --measure`, kl_topk has no bias of the gradient at any k."""
    ema_pg.measure(str(tmp_path / "picture.png"), pairs=3)
    assert is_picture(tmp_path / "picture.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("top-k  ")]
    assert [row[1] for row in rows] == ["0", "1", "2", "4", "8", "11", "12"]
    assert [float(row[-2]) for row in rows] == [0] * 7


@pytest.mark.parametrize("kind", ["k3", "topk"])
def test_the_estimated_kl_has_its_gradient(kind):
    """With β the gradient is that of the loss plus β times the estimate, summed over every trajectory."""
    ema_pg.replace(kind, k=3)

    def estimate(log_pi, log_ref, response):
        if kind == "topk":
            return ema_pg.kl_topk(log_pi, log_ref, torch.tensor(response), 3).sum()
        places = range(len(response)), response
        return ema_pg.kl_k3(log_pi[places], log_ref[places]).sum()

    check_kl_term(estimate)


def test_the_reference_follows(tiny, tmp_path, odd_is_right, monkeypatch):
    """With --ema-decay the reference moves by θ_ref ← decay · θ_ref + (1 - decay) · θ, every second iteration here."""
    placed = []
    thetas = []
    spy(monkeypatch, "distribute", lambda _, __, model: placed.append(model))
    ema_pg.replace("exact", decay=0.7, every=2)
    spy(monkeypatch, "update", lambda args, *_: thetas.append(flat(args[0])))
    empg.main(options(tiny, tmp_path, steps=5, lr=0.01, eval_every=0, beta=0.1))
    expected = flat(load(tiny))
    for theta in (thetas[1], thetas[3]):  # after the second iteration and the fourth
        expected = 0.7 * expected + 0.3 * theta
    reference, _policy = placed
    torch.testing.assert_close(flat(reference), expected)


def test_a_moving_reference_is_not_resumed(capfd):
    """A checkpoint does not have the reference. So ema_pg.py refuses to go on with one that moves, in a line."""
    refuses(capfd, ema_pg.main, ["--beta=0.1", "--ema-decay=0.9", "--output=x", "--resume"], "--ema-decay", "--resume")


def test_a_moving_reference_outlives_a_skipped_first_update():
    """If the very first gradient is not finite, Adam has no state yet. The next iteration goes on all the same."""
    model = make_model()
    reference = make_model().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = functools.partial(ema_pg.moving_update, empg.update, 0.7, 1, model, optimizer)
    skipped = step(rows_with(math.nan * ADVANTAGES), config(), reference)
    assert math.isnan(skipped["grad_norm"])
    assert ema_pg.updates_done(model, optimizer) == 0
    taken = step(rows_with(ADVANTAGES), config(), reference)
    assert math.isfinite(taken["grad_norm"])
    assert ema_pg.updates_done(model, optimizer) == 1


# ------------------------------ svrg.py ------------------------------


def plain_gradient(theta: torch.Tensor, rows: list[dict]) -> torch.Tensor:
    """The gradient of the mean over these trajectories at θ, from plain passes."""
    model = make_model()
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    terms = [row["advantage"] * plain_logprobs(model, row["prompt"], row["response"]).sum() for row in rows]
    (-torch.stack(terms).mean()).backward()
    return flat_grad(model)


def svrg_steps(lr: float, control_variate: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """θ and the gradient that is followed, for each of four steps."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append((flat(model), flat_grad(model))))
    svrg.update(model, optimizer, rows_with(ADVANTAGES), config(), parts=4, control_variate=control_variate)
    return found


def test_svrg_is_its_formula():
    """Each step follows g_B(θ) - g_B(θ*) + g_D(θ*), from plain passes; where θ = θ*, that is the gradient of the whole
    buffer for every part, and without the control variate only the mean of the parts is."""
    rows = rows_with(ADVANTAGES)
    old_theta = flat(make_model())
    parts = svrg.random_parts(rows, 4, [0, 0])
    assert [len(part) for part in parts] == [2] * 4
    assert sorted(rows.index(row) for part in parts for row in part) == list(range(8))

    whole = plain_gradient(old_theta, rows)
    for part, (theta, followed) in zip(parts, svrg_steps(0.1, control_variate=True), strict=True):
        expected = plain_gradient(theta, part) - plain_gradient(old_theta, part) + whole
        assert same_gradient(followed, expected)
    for _, followed in svrg_steps(0.0, control_variate=True):
        assert same_gradient(followed, whole)
    plain = [followed for _, followed in svrg_steps(0.0, control_variate=False)]
    assert same_gradient(sum(plain) / 4, whole)
    assert not same_gradient(plain[0], whole)


def test_svrg_resumes_as_it_would_have_gone_on(tiny, tmp_path, odd_is_right, monkeypatch):
    """Every buffer is split in another way, in a resumed run, too."""
    monkeypatch.setattr(empg, "update", functools.partial(svrg.update, parts=3, control_variate=True))
    updates_before = []
    spy(monkeypatch, "random_parts", lambda args, *_: updates_before.append(args[2][1]), svrg)
    empg.main(options(tiny, tmp_path / "whole", steps=4))
    assert updates_before == [0, 3, 6, 9]
    for steps in (2, 4):
        empg.main(options(tiny, tmp_path / "parts", "--resume", steps=steps))
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_parts_that_are_no_number_of_parts(capfd):
    """svrg.py refuses --parts 0 in one line."""
    refuses(capfd, svrg.main, ["--parts=0"], "--parts 0", "at least 1")


def test_the_study_of_svrg(tiny, tmp_path, odd_is_right, capsys):
    """svrg.py measures a variance that falls with the size of a part as sampling without replacement says, and a third
    of it or less with the control variate."""
    svrg.measure(str(tmp_path / "picture.png"), tiny, seeds=1, draws=50, prompts=3, sizes=(4, 16))
    assert is_picture(tmp_path / "picture.png")
    # The kind; variance and cosine with parts of 4; variance with parts of 16.
    pattern = r"(with|without) the control variate .*?\| +([\d.]+) \(([\d.]+)\) +([\d.]+)"
    rows = re.findall(pattern, capsys.readouterr().out)
    assert [kind for kind, *_ in rows] == ["without", "with"] * 4
    plain_4, plain_cosine, plain_16 = map(float, rows[0][1:])
    svrg_4, svrg_cosine, _ = map(float, rows[1][1:])
    # Of 48 trajectories, the variance is proportional to 1/n - 1/48. So the ratio should be 5.5.
    assert 3 < plain_4 / plain_16 < 8
    assert svrg_4 < plain_4 / 3
    assert svrg_cosine > plain_cosine


# ------------------------------ tables.py, behaviours.py, word_problems.py ------------------------------


def test_tables_of_studies(runs_of_studies):
    """A row has the name of a setting, and the mean and the deviation of each column over its seeds."""
    head, _, *rows = tables.table(runs_of_studies, seconds=45).splitlines()
    names, clipped, none = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *rows))
    assert dict(zip(names, none, strict=True)) == {
        "": "none-2, 2 seeds",
        "after 10": "0.400 ± 0.000",
        "after 20": "0.300 ± 0.000",
        "after 30": "0.600 ± 0.141",
        "lowest from 20 on": "0.300 ± 0.000",
        "response tokens": "4.500 ± 0.707",
        "seconds an iteration": "2.000 ± 0.000",
        "after 45 s": "0.300 ± 0.000",  # 22 iterations have been done, and the last evaluation was after 20
        "iterations by then": "20.000 ± 0.000",
    }
    assert clipped[:2] == ["clipped-4-0", "0.400 ± 0.000"]


def test_the_study_of_behaviours(tmp_path, capsys):
    """A behaviour is counted once per response, and words that only look like its phrases are not."""
    texts = [
        *("Step 1: add.", "Case 1: x. Case 1.", "Let's verify the sum.", "Wait, no.", "Let me reconsider."),
        *("The waiter made three cakes.", "She reached step 10.", "A checkered flag."),
    ]
    found = behaviours.find(texts)
    assert [len(hits) for hits in found.values()] == [2, 1, 2]
    behaviours.main(results(tmp_path / "results", [1, 0]))
    assert "backtracking: 2 of 2 responses, 100.0%" in capsys.readouterr().out


def test_word_problems(tmp_path, capsys):
    """word_problems.py draws disjoint parts, runs both stages and compares the scores; called again, it repeats
    neither."""
    save(make_model(max_position_embeddings=128, scale=0.1), tmp_path / "model")

    def row(i):
        return {"body": f"{i}+", "question": "1=", "formula": f"{i % 3}+0={i % 3}", "answer": f"{i % 3} (x)"}

    data = write_rows(tmp_path / "data", validation=[row(i) for i in range(990)])
    svamp = write_rows(tmp_path / "svamp", test=[{"Body": "1+", "Question": "1=", "Answer": "2"}])
    parts = [{row["question"] for row in word_problems.asdiv(part, str(data))} for part in word_problems.PARTS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 990

    words = [f"--model={tmp_path}/model", f"--data={data}", f"--svamp={svamp}", f"--output={tmp_path}", "--device=cpu"]
    words += ["--steps=2", "--eval-problems=4"]
    word_problems.main(words)
    report = capsys.readouterr().out
    assert len(metrics(tmp_path / "empg-0")) == 4
    assert report.count("McNemar") == 2

    shutil.rmtree(tmp_path / "model")  # so stage 1 cannot be repeated
    word_problems.main(words)
    again = capsys.readouterr().out
    assert "Resuming after iteration 2" in again
    assert again.endswith(report[report.index("accuracy  ") :])


# ------------------------------ The texts ------------------------------


TEXTS = ["README.md", "docs/em.md", "docs/running.md", "studies/README.md"]


def anchors(text: str) -> set[str]:
    """The names under which a Markdown file's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    """Every file, picture and heading that a text of this project links to is there."""
    file = HERE.parent / name
    for link in re.findall(r"\]\(([^)]*)\)", file.read_text()):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text()), link


def test_the_pieces_that_can_be_copied_are_named():
    """docs/running.md names the functions that a test of test_empg.py runs alone."""
    text = (HERE.parent / "docs/running.md").read_text()
    (sentence,) = re.findall(r"To have their code in your own file, (.*?)\.", text, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", sentence)) == PIECES_TO_COPY


def test_a_run_can_be_sent_to_weights_and_biases(tiny, tmp_path, odd_is_right, monkeypatch):
    """The lines of docs/running.md send a run's options and all of its rows, to a stand-in here."""
    empg.main(options(tiny, tmp_path))
    (program,) = re.findall(r"```python\n(.*?)```", (HERE.parent / "docs/running.md").read_text(), re.DOTALL)
    sent = []
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda project, config: sent.append(config["method"])
    stand_in.log = lambda row: sent.append(row["step"])
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    (tmp_path / "send.py").write_text(program.replace("runs/NAME", str(tmp_path)))
    runpy.run_path(str(tmp_path / "send.py"))
    assert sent == ["EMPG", *(row["step"] for row in metrics(tmp_path))]
