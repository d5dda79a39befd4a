"""The loop of GRPO on a tiny model: files of a workdir, figures, refills, early stop, mistakes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import group_case
from tests.train import run_tiny
from vrt_jax.config import MeshConfig, TrainConfig
from vrt_jax.placement import batch_shardings, place
from vrt_jax.rl.groups import (
  advantages_of,
  equal_groups,
  joined_rewards,
  refill_source,
  with_advantages,
)
from vrt_jax.runtime import make_mesh
from vrt_jax.train import grpo_loop, loop
from vrt_jax.train.evaluation import HeldOut

KEYS = {
  "loss", "loss/policy", "loss/mask_bce", "loss/mask_dice", "kl", "clip_share", "grad_norm",
  "skipped_steps", "reward/mean", "reward/std", "reward/zero_std_share", "reward/format",
  "reward/answer", "reward/trace", "reward/letters", "advantage/mean_abs", "advantage/max",
  "rollout/length", "rollout/truncated_share", "rollout/entropy", "rollout/segs",
  "rollout/logprob_gap", "learning_rate", "step_seconds", "rollout_seconds", "reward_seconds",
  "update_seconds", "tokens_per_second", "compiles", "refills", "step",
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return run_tiny.write_records(tmp_path_factory.mktemp("grpo") / "records")


def config(records: Path, **options: object) -> TrainConfig:
  return run_tiny.make_config(records, {"algorithm": "grpo", "steps": 4, **options})


def lines_of(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_a_workdir_holds(records: Path, tmp_path: Path):
  grpo = {"html_every": 2, "kl_weight": 0.1}
  loop.train(config(records, grpo=grpo, eval_every=4), tmp_path / "run")
  lines = lines_of(tmp_path / "run")
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert {k for k in lines[0] if not k.startswith("eval/")} == KEYS
  assert "eval/answer_miou" in lines[-1]
  for line in lines:
    assert line["rollout/logprob_gap"] < 1e-4
    assert line["reward/mean"] == pytest.approx(line["reward/letters"], abs=1e-6)
    assert line["compiles"] == 2
    parts = line["rollout_seconds"] + line["reward_seconds"] + line["update_seconds"]
    assert 0 < parts < line["step_seconds"]
  pages = sorted(p.name for p in (tmp_path / "run" / "rollouts").iterdir())
  assert pages == ["step_2.html", "step_4.html"]
  for part in ("config.json", "model/config.json", "model_best/config.json", "checkpoints/4"):
    assert (tmp_path / "run" / part).exists()
  assert lines[0]["kl"] < 1e-9 < lines[-1]["kl"]  # fresh adapters are the start model


def test_early_stop(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
  scores = {2: 0.3, 4: 0.2, 6: 0.1, 8: 0.9}

  def metrics(self: HeldOut, step: int, state: object, frozen: object) -> dict[str, float]:
    return {"answer_miou": scores[step]}

  monkeypatch.setattr(HeldOut, "metrics", metrics)
  options = {"steps": 8, "eval_every": 2, "early_stop": 2}
  loop.train(config(records, **options), tmp_path / "run")
  assert lines_of(tmp_path / "run")[-1]["step"] == 6
  assert "stopped after step 6: answer_miou is not above that of step 2" in capsys.readouterr().out
  loop.train(config(records, **options), tmp_path / "run")  # it stays stopped
  assert lines_of(tmp_path / "run")[-1]["step"] == 6
  assert "best model: step 2" in capsys.readouterr().out


def test_equal_rewards_change_nothing_but_take_all_refills(records: Path, tmp_path: Path):
  grpo = {
    "drop_equal_groups": True,
    "max_refills": 2,
    "mask_loss": "off",
    "extra_rewards": [["tests.rl.user_rewards:constant", 1.0]],
  }
  loop.train(config(records, grpo=grpo, steps=2, weight_decay=0.0), tmp_path / "run")
  for line in lines_of(tmp_path / "run"):
    assert (line["refills"], line["reward/zero_std_share"]) == (2, 1.0)
    assert line["advantage/max"] == line["grad_norm"] == 0.0
    assert line["compiles"] == 3


def test_refills_replace_equal_groups_in_order():
  kept = np.array([[1, 1], [0, 1], [0, 0], [2, 2]], np.float32)
  fresh = np.array([[1, 0], [1, 1], [3, 1], [1, 1]], np.float32)
  source = refill_source(kept, fresh)
  assert source.tolist() == [0, -1, 2, -1]
  joined = joined_rewards(kept, source, fresh)
  assert joined.tolist() == [[1, 0], [0, 1], [3, 1], [2, 2]]
  assert equal_groups(joined).tolist() == [False, False, False, True]


def test_joined_batches_have_the_chosen_rows_of_every_array():
  mesh = make_mesh(MeshConfig())
  first = group_case.random_batch()
  second = jax.tree.map(lambda x: x[::-1] if x.dtype == bool else x + 1, first)
  source = np.array([2, -1, 0, -1], np.int32)
  shardings = batch_shardings(first, mesh)
  kept, fresh = (place(jax.tree.map(jnp.asarray, b), shardings) for b in (first, second))
  joined = grpo_loop.join_groups(kept, source, fresh, mesh=mesh)

  def expected(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    axis = int(a.ndim == 3 and a.shape[0] == 3 and a.shape[1] == 4)  # position_ids
    a, b = np.moveaxis(np.asarray(a), axis, 0), np.moveaxis(np.asarray(b), axis, 0)
    rows = np.stack([b[2], a[1], b[0], a[3]])
    return np.moveaxis(rows, 0, axis)

  jax.tree.map(
    lambda got, a, b: np.testing.assert_array_equal(got, expected(a, b)), joined, first, second
  )
  same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), joined, shardings)
  assert all(jax.tree.leaves(same))


def test_advantages_reach_the_batch():
  mesh = make_mesh(MeshConfig())
  rewards = np.array([[0, 1, 2], [1, 1, 1], [3, 0, 0], [0, 0, 1]], np.float32)
  advantages = advantages_of(rewards, group_case.GRPO)
  batch = with_advantages(group_case.random_batch(), advantages, mesh)
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  std = rewards.std(axis=1, ddof=1, keepdims=True)
  np.testing.assert_allclose(batch.advantages, centred / (std + 1e-4), atol=1e-5)
  dr_grpo = dataclasses.replace(group_case.GRPO, normalisation="dr_grpo")
  plain = with_advantages(batch, advantages_of(rewards, dr_grpo), mesh)
  np.testing.assert_allclose(plain.advantages, centred, atol=1e-6)


def test_a_rollout_key_depends_on_step_and_refill():
  key = jax.random.key(3)
  keys = {
    jax.random.key_data(grpo_loop.rollout_key(key, step, refill)).tobytes()
    for step in range(3)
    for refill in range(3)
  }
  assert len(keys) == 9


def test_mistakes_leave_no_workdir(records: Path, tmp_path: Path):
  for options, message in (
    ({"grpo": {"extra_rewards": [["no.such:thing", 1.0]]}}, "grpo.extra_rewards"),
    ({"grpo": {"prompt_buckets": [[256, 32]]}}, "grpo.prompt_buckets hold 32 patches"),
    ({"trainable": "all"}, 'optim.trainable is "all"'),
    ({"grpo": {"rollout_tensor": 3}}, "grpo.rollout_tensor 3 does not divide mesh.fsdp"),
    ({"eval": {"tensor": 3}}, "eval.tensor 3 does not divide mesh.fsdp"),
  ):
    with pytest.raises(ValueError, match=message):
      loop.train(config(records, **options), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number_ends_the_run(records: Path, tmp_path: Path):
  grpo = {"extra_rewards": [["tests.rl.user_rewards:broken", 1.0]]}
  with pytest.raises(ValueError, match="reward broken: it gave nan"):
    loop.train(config(records, grpo=grpo), tmp_path / "run")
