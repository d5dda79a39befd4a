"""Parameters as streams of blocks, so that a model of any size converts in the memory of a few."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import google_crc32c
import numpy as np

from converters.rules import Part, Shape
from converters.tensor_files import TensorSource

MAX_BLOCK_BYTES = 64 * 2**20

Read = Callable[[int, int], np.ndarray]
"""(start, stop) -> rows start .. stop - 1 along the first axis."""


@dataclass(frozen=True)
class StreamedArray:
  """An array of at least one axis whose values are read `rows` rows at a time."""

  shape: Shape
  dtype: np.dtype
  rows: int
  read: Read
  chunks: Shape = ()
  """Shape of the chunks it is to be stored in; () for blocks of `rows` rows."""

  @property
  def size(self) -> int:
    """Number of values."""
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    """Bytes of all values."""
    return self.size * self.dtype.itemsize

  def blocks(self) -> Iterator[np.ndarray]:
    """All values, block by block."""
    for start in range(0, self.shape[0], self.rows):
      yield self.read(start, min(start + self.rows, self.shape[0]))

  def astype(self, dtype: str) -> "StreamedArray":
    """The same values in another dtype."""
    if np.dtype(dtype) == self.dtype:
      return self
    read = self.read
    return replace(self, dtype=np.dtype(dtype), read=lambda *rows: read(*rows).astype(dtype))

  def reshape(self, shape: Shape) -> "StreamedArray":
    """The same values in rows of another shape."""
    read = self.read
    return replace(
      self, shape=shape, read=lambda a, b: read(a, b).reshape(b - a, *shape[1:]), chunks=()
    )

  def layer(self, index: int) -> "StreamedArray":
    """Entry `index` of the first axis, in one block."""
    shape, read = self.shape[1:], self.read
    return StreamedArray(
      shape, self.dtype, max(1, shape[0]), lambda a, b: read(index, index + 1)[0][a:b]
    )


class Checksums:
  """CRC32C of the tensors that have been read or written, by name, as eight hex digits."""

  def __init__(self) -> None:
    self._values: dict[str, int] = {}

  def add(self, key: str, block: np.ndarray) -> None:
    """The next values of a tensor."""
    data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    self._values[key] = google_crc32c.extend(self._values.get(key, 0), data)

  def hex(self) -> dict[str, str]:
    """Name -> checksum."""
    return {key: f"{value:08x}" for key, value in sorted(self._values.items())}


def block_rows(shape: Shape, itemsize: int) -> int:
  """How many rows of an array make a block; at least one."""
  row_bytes = int(np.prod(shape[1:])) * itemsize
  return max(1, min(shape[0], MAX_BLOCK_BYTES // max(1, row_bytes)))


def whole(array: np.ndarray) -> StreamedArray:
  """An array in memory as one block."""
  return StreamedArray(array.shape, array.dtype, max(1, len(array)), lambda a, b: array[a:b])


def of_source(source: TensorSource, key: str) -> StreamedArray:
  """A tensor of a checkpoint as it is."""
  shape, dtype = source.shapes[key], np.dtype(source.dtypes[key])
  rows = block_rows(shape, dtype.itemsize)
  return StreamedArray(shape, dtype, rows, lambda a, b: source.rows(key, a, b))


def from_parts(
  source: TensorSource, parts: Sequence[Part], shape: Shape, checksums: Checksums
) -> StreamedArray:
  """Our parameter of `shape` from the tensors it is made of.

  `checksums` sees what is read, so its values count where each block is read once, in order.

  Raises:
    ValueError: layers of different dtypes.
  """
  dtypes = {source.dtypes[part.key] for part in parts}
  if len(dtypes) > 1:
    raise ValueError(f"{parts[0].key} and its other layers have dtypes {sorted(dtypes)}")
  dtype = np.dtype(dtypes.pop())
  stacked = parts[0].layer is not None

  def read(start: int, stop: int) -> np.ndarray:
    if stacked:
      whole_layers = [(part.key, 0, source.shapes[part.key][0]) for part in parts[start:stop]]
    else:
      offset = parts[0].row or 0
      whole_layers = [(parts[0].key, start + offset, stop + offset)]
    blocks = []
    for key, first, last in whole_layers:
      blocks.append(source.rows(key, first, last))
      checksums.add(key, blocks[-1])
    joined = blocks[0] if len(blocks) == 1 else np.stack(blocks)
    return joined.reshape(stop - start, *shape[1:])

  return StreamedArray(shape, dtype, 1 if stacked else block_rows(shape, dtype.itemsize), read)


def stacked_rows(arrays: Sequence[StreamedArray]) -> StreamedArray:
  """Arrays [1, ..] as the rows of one."""
  shape = (len(arrays), *arrays[0].shape[1:])
  return StreamedArray(
    shape,
    arrays[0].dtype,
    len(arrays),
    lambda a, b: np.concatenate([array.read(0, 1) for array in arrays[a:b]]),
  )


def merged(
  weight: StreamedArray, lora_a: StreamedArray, lora_b: StreamedArray, scale: float
) -> StreamedArray:
  """W + scale B A, layer by layer in float32, in the dtype of W. All three are stacked [L, ..]."""

  def read(start: int, stop: int) -> np.ndarray:
    w, a, b = (x.read(start, stop) for x in (weight, lora_a, lora_b))
    update = b.astype(np.float32) @ a.astype(np.float32)
    return (w.astype(np.float32) + np.float32(scale) * update).astype(w.dtype)

  return replace(weight, rows=1, read=read, chunks=())


def merge_adapters(params: dict[str, StreamedArray], scale: float) -> dict[str, StreamedArray]:
  """Parameters without LoRA's, which are added to the weights they adapt."""
  plain = {k: v for k, v in params.items() if not k.endswith((".lora_a", ".lora_b"))}
  for name in params:
    if name.endswith(".lora_a"):
      module = name.removesuffix(".lora_a")
      pair = params[name], params[f"{module}.lora_b"]
      plain[f"{module}.weight"] = merged(plain[f"{module}.weight"], *pair, scale)
  return plain
