"""Set-ups that would fail later or train nothing are refused with one line."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from configs import shapes_grpo, vrt_qwen3_4b_grpo
from tests import tiny
from vrt_jax.config import EvalConfig, GrpoConfig, LoraConfig, MeshConfig, OptimConfig, TrainConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.runtime import make_mesh
from vrt_jax.train import checks
from vrt_jax.train.optim import make_optimizer
from vrt_jax.train.state import create_state

CONFIG = tiny.train_config()


def with_part(part: str, **fields: object) -> TrainConfig:
  return dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **fields)})


def test_the_recipes_pass():
  for config in (CONFIG, TrainConfig(), dataclasses.replace(CONFIG, eval_every=100)):
    checks.check_numbers(config)
    checks.check_buckets_hold(config, config.image)


NUMBERS = {
  "optim.steps is 0, it must be at least 1": with_part("optim", steps=0),
  "optim.accumulation_steps is 0, it must be": with_part("optim", accumulation_steps=0),
  "log_every is 0": dataclasses.replace(CONFIG, log_every=0),
  "keep_checkpoints is 0": dataclasses.replace(CONFIG, keep_checkpoints=0),
  "eval.batch_size is 0": with_part("eval", batch_size=0),
  "optim.max_skipped_steps is -1, it must be at least 0": with_part("optim", max_skipped_steps=-1),
  "model.lora.rank is -2": with_part("model", lora=LoraConfig(rank=-2)),
  "eval_every 75 is not a multiple of checkpoint_every 50": dataclasses.replace(
    CONFIG, eval_every=75
  ),
  'best_metric "miou" is none of reasoning_miou, ': dataclasses.replace(CONFIG, best_metric="miou"),
}


@pytest.mark.parametrize("message", NUMBERS)
def test_numbers(message: str):
  with pytest.raises(ValueError) as error:
    checks.check_numbers(NUMBERS[message])
  assert str(error.value).startswith(message)


USER = "tests.rl.user_rewards"


def grpo(**fields: object) -> TrainConfig:
  """A recipe of reinforcement learning; fields are of GrpoConfig."""
  config = with_part("optim", trainable="language")
  return dataclasses.replace(config, algorithm="grpo", grpo=GrpoConfig(**fields))


GRPO_MISTAKES = {
  "grpo.group_size is 1, it must be at least 2": grpo(group_size=1),
  "grpo.max_new_tokens is 1, ": grpo(max_new_tokens=1),
  "grpo.max_masks is 0, ": grpo(max_masks=0),
  "grpo.updates_per_rollout is 0, ": grpo(updates_per_rollout=0),
  "grpo.max_refills is -1, ": grpo(max_refills=-1),
  "grpo.kl_weight is -0.1, ": grpo(kl_weight=-0.1),
  "grpo.temperature is 0.0, it must be": grpo(temperature=0.0),
  "grpo.top_p is 1.5, it must be from 1e-06 to 1": grpo(top_p=1.5),
  "grpo.epsilon is 0.0, ": grpo(epsilon=0.0),
  "all weights of rewards are 0": grpo(
    format_weight=0, answer_weight=0, extra_rewards=((f"{USER}:brevity", 0.0),)
  ),
  "grpo.reward_clip (1.0, 1.0) must be (low, high)": grpo(reward_clip=(1.0, 1.0)),
  'grpo.extra_rewards: "f" is not of the form': grpo(extra_rewards=(("f", 1.0),)),
  "algorithm grpo rewards reasoning traces": dataclasses.replace(
    grpo(), data=dataclasses.replace(CONFIG.data, thinking=False)
  ),
  'optim.trainable is "all"': dataclasses.replace(grpo(), optim=OptimConfig(trainable="all")),
  "grpo.kl_weight compares with the model without adapters": dataclasses.replace(
    grpo(kl_weight=0.1), model=tiny.MODEL
  ),
  "grpo.drop_equal_groups joins rollouts of one size": grpo(
    drop_equal_groups=True, prompt_buckets=((160, 64), (256, 64))
  ),
  "optim.steps 30 is not a multiple of grpo.updates_per_rollout 4": grpo(updates_per_rollout=4),
  "checkpoint_every 50 is not a multiple of grpo.updates_per_rollout 3": grpo(
    updates_per_rollout=3
  ),
}


@pytest.mark.parametrize("message", GRPO_MISTAKES)
def test_reinforcement_learning(message: str):
  with pytest.raises(ValueError) as error:
    checks.check_numbers(GRPO_MISTAKES[message])
    checks.check_grpo(GRPO_MISTAKES[message])
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)


def test_recipes_of_reinforcement_learning_pass():
  only_extra = grpo(format_weight=0, answer_weight=0, extra_rewards=((f"{USER}:brevity", 1.0),))
  for config in (grpo(), only_extra, shapes_grpo.get_config(), vrt_qwen3_4b_grpo.get_config()):
    checks.check_numbers(config)
    checks.check_grpo(config)
    checks.check_buckets_hold(config, config.image)
  with pytest.raises(ValueError, match=r"grpo.prompt_buckets hold 32 patches"):
    checks.check_buckets_hold(grpo(prompt_buckets=((384, 32),)), tiny.IMAGE)


def test_early_stop_needs_evaluations():
  with pytest.raises(ValueError, match="early_stop needs evaluations"):
    checks.check_numbers(dataclasses.replace(CONFIG, early_stop=2))
  checks.check_numbers(dataclasses.replace(CONFIG, early_stop=2, eval_every=50))


def test_batches_that_do_not_divide():
  mesh = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 3})

  def config(batch: int, steps: int, held_out: int, eval_every: int = 0) -> TrainConfig:
    optim = OptimConfig(batch_size=batch, accumulation_steps=steps)
    evaluation = EvalConfig(batch_size=held_out)
    return dataclasses.replace(CONFIG, optim=optim, eval=evaluation, eval_every=eval_every)

  checks.check_batch(config(8, 2, 4), mesh, 5)
  checks.check_batch(config(8, 2, 3), mesh, 0)
  with pytest.raises(ValueError, match=r"batch_size 8 .* 4 accumulation steps on 4 parts of the"):
    checks.check_batch(config(8, 4, 4), mesh, 0)
  with pytest.raises(ValueError, match=r"eval.batch_size 6 does not divide over 4 parts"):
    checks.check_batch(config(8, 2, 6), mesh, 5)
  with pytest.raises(ValueError, match=r"eval_every is 50, but there are no held-out records"):
    checks.check_batch(config(8, 2, 4, 50), mesh, 0)


def test_buckets_that_hold_too_little():
  with pytest.raises(ValueError, match=r"data.buckets: \(40, 64\) has 40 tokens, for 16 visual"):
    checks.check_buckets_hold(with_part("data", buckets=((40, 64),)), tiny.IMAGE)
  with pytest.raises(ValueError, match=r"eval.prompt_buckets: \(47, 64\)"):
    checks.check_buckets_hold(with_part("eval", prompt_buckets=((47, 64),)), tiny.IMAGE)
  with pytest.raises(ValueError, match=r"data.buckets hold 32 patches, .* have up to 64"):
    checks.check_buckets_hold(with_part("data", buckets=((384, 32),)), tiny.IMAGE)


def test_tokens_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch):
  checks.check_tokens(tiny.tokenizer())
  monkeypatch.setattr(ChatTokenizer, "encode", lambda self, text: [1, 2])
  with pytest.raises(ValueError, match=r"the tokenizer of the base model has no token"):
    checks.check_tokens(tiny.tokenizer())


def test_something_must_train():
  state = [
    create_state(
      tiny.random_model(),
      make_optimizer(CONFIG.optim),
      lambda path, variable, nothing=nothing: not nothing and path[0] == "text_hidden_fcs",
      make_mesh(MeshConfig()),
    )
    for nothing in (False, True)
  ]
  checks.check_trainable(*state[0])
  with pytest.raises(ValueError, match=r"no parameter trains: see optim.trainable"):
    checks.check_trainable(*state[1])
  assert not jax.tree.leaves(state[1][0].trainable)
