"""Processes, mesh and compile counting."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vrt_jax.config import MeshConfig
from vrt_jax.cores import usable_cores
from vrt_jax.runtime import (
  CompileCounter,
  batch_parts,
  data_share,
  largest,
  make_mesh,
  mesh_axes,
  start_processes,
  use_cpu_cores,
)

ROOT = Path(__file__).resolve().parents[1]


def test_mesh_takes_what_is_left():
  mesh = make_mesh(MeshConfig(data=-1))
  assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
  with pytest.raises(ValueError, match="does not fit"):
    make_mesh(MeshConfig(data=jax.device_count() + 1))


def test_a_mesh_axis_divides_what_it_fits():
  sizes = {"data": 1, "fsdp": 2, "tensor": 4}
  assert mesh_axes(("heads", "embed"), (3, 8, 6), sizes) == [None, "tensor", "fsdp"]
  assert mesh_axes(("heads", "embed"), (6, 6), sizes) == [None, "fsdp"]  # 6 heads on 4 devices
  assert mesh_axes((None,), (8,), sizes) == [None]


def test_one_process_is_leader_and_has_every_row():
  mesh = make_mesh(MeshConfig())
  assert data_share(mesh) == (0, 1)
  assert batch_parts(mesh) == jax.device_count()
  assert largest(3) == 3


def test_bad_process_variables(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
  start_processes()  # asked to stay alone
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
  with pytest.raises(ValueError, match=r"needs a number in JAX_PROCESS_ID, which is None"):
    start_processes()
  monkeypatch.setenv("JAX_PROCESS_ID", "first")
  with pytest.raises(ValueError, match=r"needs a number in JAX_PROCESS_ID, which is 'first'"):
    start_processes()


EIGHT = """
import jax, numpy as np
from vrt_jax.config import MeshConfig
from vrt_jax.runtime import data_share, make_mesh, with_tensor

mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1, slices=2))
assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
ids = np.vectorize(lambda d: d.id)(mesh.devices)
assert set(ids[:2].flat) == {0, 1, 2, 3}, ids  # a slice has half of the data axis
joined = with_tensor(make_mesh(MeshConfig(data=1, fsdp=8)), 4)
assert dict(joined.shape) == {"data": 1, "fsdp": 2, "tensor": 4}
assert with_tensor(mesh, 2).devices.ravel().tolist() == mesh.devices.ravel().tolist()
assert with_tensor(mesh, 1) is mesh
wrong = {
  MeshConfig(data=2, fsdp=4, slices=4): "mesh.slices 4 does not divide the data axis 2",
  MeshConfig(data=3): "mesh (3, 1, 1) (data, fsdp, tensor) does not fit 8 devices",
  MeshConfig(data=0): "mesh sizes (0, 1, 1) and mesh.slices 1 must be positive",
  MeshConfig(slices=0): "mesh sizes (-1, 1, 1) and mesh.slices 0 must be positive",
}
for config, message in wrong.items():
  try:
    make_mesh(config)
  except ValueError as error:
    assert str(error) == message, error
  else:
    raise AssertionError(config)


class Device:
  platform = device_kind = "fake"

  def __init__(self, number, process, slice_index):
    self.id, self.process_index, self.slice_index = number, process, slice_index


def fake(processes):
  jax.process_index = lambda: 1
  grid = np.array([Device(i, p, 0) for i, p in enumerate(np.ravel(processes))])

  class Fake:
    devices = grid.reshape(np.shape(processes))
    shape = dict(zip(("data", "fsdp", "tensor"), np.shape(processes)))

  return Fake


assert data_share(fake([[[0], [0]], [[1], [1]]])) == (1, 2)
assert data_share(fake([[[0, 1]], [[0, 1]]])) == (0, 1)  # joined by the tensor axis
assert data_share(fake([[[2], [1]], [[2], [1]]])) == (1, 2)  # every other row
try:
  data_share(fake([[[0, 1]], [[1, 1]], [[0, 0]]]))
except ValueError as error:
  assert "share parts of a batch unequally" in str(error)
else:
  raise AssertionError
jax.devices = lambda: [Device(i, 0, i // 4) for i in range(8)]
try:
  make_mesh(MeshConfig(slices=4))
except ValueError as error:
  assert str(error) == "mesh.slices is 4, but there are 2 slices"
else:
  raise AssertionError
"""


def test_slices_and_shares_on_eight_devices():
  environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  done = subprocess.run(
    [sys.executable, "-c", EIGHT], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_cpu_devices_are_as_many_as_the_cores_one_may_use(monkeypatch: pytest.MonkeyPatch):
  asked = []
  monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append((name, value)))
  for cores, batch in ((4, 8), (1, 8), (4, 6), (3, 8)):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
    use_cpu_cores(batch)
  assert asked == [("jax_num_cpu_devices", n) for n in (4, 1, 2, 2)]


def test_where_cores_are_not_given_out_all_count(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.delattr(os, "sched_getaffinity", raising=False)
  for found, wanted in ((6, 6), (None, 1)):
    monkeypatch.setattr(os, "cpu_count", lambda n=found: n)
    assert usable_cores() == wanted


def test_compile_counter_sees_compilations_until_it_is_closed():
  function = jax.jit(lambda x: x * 3 + 1)
  x = jnp.ones(3)
  counter = CompileCounter()
  function(x)
  function(x)
  assert counter.count == 1
  counter.close()
  function(jnp.ones(5))
  assert counter.count == 1
