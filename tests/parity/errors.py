"""How far our arrays are from PyTorch's."""

import numpy as np
import torch


def as_numpy(x: object) -> np.ndarray:
  """An array or a tensor (with or without gradient) as a numpy array."""
  return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def max_error(ours: object, theirs: object) -> float:
  """The largest absolute difference; shapes must agree. NaN anywhere gives NaN."""
  a, b = as_numpy(ours), as_numpy(theirs)
  assert a.shape == b.shape, (a.shape, b.shape)
  assert a.size
  return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def unit_error(ours: object, theirs: object) -> float:
  """The largest difference in units of the reference's root mean square."""
  return max_error(ours, theirs) / float(np.sqrt(np.mean(as_numpy(theirs).astype(np.float64) ** 2)))


def channels_last(x: torch.Tensor) -> np.ndarray:
  """[.., C, Y, X] -> [.., Y, X, C]."""
  return np.moveaxis(as_numpy(x), -3, -1)
