"""Launch files for pods: what they would run."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

PODS = Path(__file__).resolve().parents[2] / "scripts/pods"
NAMES = {"PROJECT": "mine", "ZONE": "us-west4-a", "TPU": "vrt", "BUCKET": "gs://b"}


def tpu_vm(*args: str, **environment: str) -> subprocess.CompletedProcess:
  env = os.environ | {"DRY_RUN": "1", "REPOSITORY": "https://host/vrt-jax"} | environment
  return subprocess.run([PODS / "tpu_vm.sh", *args], env=env, capture_output=True, text=True)


def test_a_slice_is_made_and_deleted():
  made = tpu_vm("create", **NAMES, TYPE="v5litepod-64")
  assert made.returncode == 0, made.stderr
  (line,) = made.stdout.splitlines()
  assert line.startswith("gcloud compute tpus queued-resources create vrt --node-id vrt")
  assert "--accelerator-type v5litepod-64" in line and "--spot" in line
  assert "--project mine --zone us-west4-a" in line
  assert "queued-resources delete vrt" in tpu_vm("delete", **NAMES).stdout


def test_folders_of_the_bucket_can_be_renamed():
  """Else no checkpoint and no model would ever be complete."""
  (made,) = tpu_vm("bucket", **NAMES).stdout.splitlines()
  assert made.startswith("gcloud storage buckets create gs://b --project mine --location us-west4 ")
  assert "--enable-hierarchical-namespace" in made
  assert "--rename-dir-limit" in tpu_vm("setup", **NAMES).stdout
  content = yaml.safe_load((PODS / "jobset.yaml").read_text())
  (job,) = content["spec"]["replicatedJobs"]
  (volume,) = job["template"]["spec"]["template"]["spec"]["volumes"]
  assert "rename-dir-limit=" in volume["csi"]["volumeAttributes"]["mountOptions"]


def test_all_workers_install_and_train(tmp_path):
  setup = tpu_vm("setup", **NAMES).stdout
  assert "--worker all" in setup and "https://host/vrt-jax" in setup and "gcsfuse" in setup
  done = tpu_vm("train", "--config", "configs/a b.py", **NAMES)
  (line,) = done.stdout.splitlines()
  assert "--worker all" in line
  # the line as gcloud would get it, then the command as a worker's shell would
  command = subprocess.run(
    [
      "bash",
      "-c",
      f'gcloud() {{ while [[ $1 != --command ]]; do shift; done; echo "$2"; }}; {line}',
    ],
    capture_output=True,
    text=True,
  ).stdout
  python = tmp_path / "venv/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
  python.chmod(0o755)
  (tmp_path / "vrt-jax").mkdir()
  subprocess.run(["bash", "-c", f"{command}\nwait"], cwd=tmp_path, check=True)
  words = (tmp_path / "logs/train.log").read_text().splitlines()
  assert words[:2] == ["<-m>", "<vrt_jax.train>"]
  assert words[-2:] == ["<--config>", "<configs/a b.py>"]


@pytest.mark.parametrize("missing", ["PROJECT", "ZONE", "TPU"])
def test_a_missing_name_is_said(missing):
  environment = {name: value for name, value in NAMES.items() if name != missing}
  done = tpu_vm("create", **environment)
  assert done.returncode != 0 and missing in done.stderr and not done.stdout


def test_an_unknown_word_shows_the_usage():
  done = tpu_vm("frob", **NAMES)
  assert done.returncode == 1
  assert "tpu_vm.sh create" in done.stdout and "DRY_RUN" in done.stdout


def test_the_job_set_starts_the_trainer_on_every_host():
  content = yaml.safe_load((PODS / "jobset.yaml").read_text())
  assert content["kind"] == "JobSet"
  (job,) = content["spec"]["replicatedJobs"]
  template = job["template"]["spec"]
  assert template["parallelism"] == template["completions"] > 1
  (container,) = template["template"]["spec"]["containers"]
  text = " ".join(container["command"] + container.get("args", []))
  assert "vrt_jax.train" in text
  assert int(container["resources"]["limits"]["google.com/tpu"]) > 0
