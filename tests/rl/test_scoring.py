"""Terms, weights, bounds and user functions."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.rl.samples import GOOD_TEXT, honest
from vrt_jax.config import GrpoConfig
from vrt_jax.rl.scoring import Reward, resolve_function

USER = "tests.rl.user_rewards"


def test_terms_are_weighted_and_all_are_measured():
  reward = Reward(GrpoConfig(format_weight=0.5, answer_weight=2.0))
  score = reward.score(honest())
  assert reward.names == tuple(score.terms) == ("format", "answer", "trace")
  assert score.terms["format"] == 1.0
  assert score.terms["answer"] == pytest.approx(26 / 30)
  assert score.terms["trace"] == pytest.approx((58 / 60 + 26 / 30) / 2)  # of weight 0
  assert score.total == pytest.approx(0.5 + 2 * 26 / 30)


def test_bounds_of_the_sum():
  def total(low: float, high: float) -> float:
    return Reward(GrpoConfig(reward_clip=(low, high))).score(honest()).total

  assert total(0.0, 1.5) == 1.5
  assert total(2.5, 3.0) == 2.5
  assert total(0.0, 9.0) == pytest.approx(1 + 26 / 30)


def test_user_functions_and_the_order_of_a_pool():
  config = GrpoConfig(
    format_weight=0.0,
    answer_weight=0.0,
    extra_rewards=((f"{USER}:brevity", 2.0), (f"{USER}:constant", 1.0)),
  )
  reward = Reward(config)
  assert reward.names[-2:] == ("brevity", "constant")
  samples = [honest(num_tokens=n) for n in range(64)]
  with ThreadPoolExecutor(4) as pool:
    scores = reward.score_all(samples, pool)
  assert [s.total for s in scores] == pytest.approx([2 * (1 - n / 100) + 0.25 for n in range(64)])


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("vrt_jax.rl.rewards", "is not of the form package.module:function"),
    (":f", "is not of the form"),
    ("no_such_module_at_all:f", "No module named 'no_such_module_at_all'"),
    (f"{USER}:missing", "has no function missing"),
    (f"{USER}:NOT_A_FUNCTION", "has no function NOT_A_FUNCTION"),
  ],
)
def test_functions_that_are_not_there(path: str, message: str):
  with pytest.raises(ValueError) as error:
    resolve_function(path)
  assert str(error.value).startswith("grpo.extra_rewards: ")
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_two_of_a_name_and_results_that_are_no_numbers():
  twice = ((f"{USER}:constant", 1.0), (f"{USER}:constant", 2.0))
  with pytest.raises(ValueError, match="two rewards of the name constant"):
    Reward(GrpoConfig(extra_rewards=twice))
  with pytest.raises(ValueError, match="reward broken: it gave nan, not a finite number"):
    Reward(GrpoConfig(extra_rewards=((f"{USER}:broken", 1.0),))).score(honest())


def test_compatibility_mode_is_the_reference_to_the_letter():
  endless = honest(GOOD_TEXT + "x" * 50, truncated=True)
  assert Reward(GrpoConfig(matching="reference")).score(endless).terms["format"] == 1.0
  assert Reward(GrpoConfig()).score(endless).terms["format"] == 0.0
