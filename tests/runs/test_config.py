"""config.json of this version and of those before."""

import json

import pytest
import small

from attmask_jax.errors import InputError
from attmask_jax.runs import config as run_config
from attmask_jax.training import setup

# Of runs of version 0.1, shortened: old keys, and what they are now.
OLD = {
  "heads": 3,
  "method.name": "mae",
  "method.decoder_heads": 2,
  "method.variant": "16x2x2",
  "data.batch_size": 8,
  "data.images": 64,
  "evals.avgpool": 1,
  "evals.raw": True,
  "evals.knn_temp": 0.07,
  "run.wandb.project": "",
}
NEW = {
  "num_heads": 3,
  "method.name": "mae",
  "method.decoder_num_heads": 2,
  "method.variant": "16x2x2",
  "data.batch_size": 8,
  "data.images": 64,
  "evals.pool": "mean",
  "evals.final_norm": False,
  "evals.knn_temp": 0.07,
  "run.wandb.project": "",
}


def test_old_keys_have_todays_names():
  assert run_config.upgrade(OLD) == NEW
  assert run_config.upgrade(NEW) == NEW
  old = {"evals.ks": [1, 2], "evals.temp": 0.1, "evals.k": 5, "method.heads": 4}
  assert run_config.upgrade(old) == {
    "evals.knn_ks": [1, 2], "evals.knn_temp": 0.1, "evals.knn_k": 5,
    "method.num_heads": 4,
  }  # fmt: skip


# As vit.embed of version 0.1 has it: norm = not raw and avgpool != 1.
@pytest.mark.parametrize(
  "avgpool, raw, pool, final_norm",
  [
    (0, False, "cls", True),
    (0, True, "cls", False),
    (1, False, "mean", False),
    (1, True, "mean", False),
    (2, False, "cls+mean", True),
    (2, True, "cls+mean", False),
    (3, False, "mean", True),
    (3, True, "mean", True),
  ],
)
@pytest.mark.parametrize("section", ["method", "evals"])
def test_features_of_old_runs(section, avgpool, raw, pool, final_norm):
  old = {f"{section}.avgpool": avgpool, f"{section}.raw": raw}
  new = {f"{section}.pool": pool, f"{section}.final_norm": final_norm}
  assert run_config.upgrade(old) == new


@pytest.mark.parametrize("raw", [False, True])
def test_single_tokens_of_old_evaluations(raw):
  new = {"evals.final_norm": not raw}
  assert run_config.upgrade({"evals.raw": raw}) == new


def test_a_config_is_written_and_read(tmp_path):
  config = small.config()
  run_config.write_config(config, tmp_path, images=64)
  read = run_config.read_config(tmp_path).to_dict()
  assert read["data"].pop("images") == 64
  assert read == config.to_dict()
  (tmp_path / "config.json").write_text(json.dumps(OLD))
  assert run_config.read_config(tmp_path).to_dict() == {
    "num_heads": 3,
    "method": {"name": "mae", "decoder_num_heads": 2, "variant": "16x2x2"},
    "data": {"batch_size": 8, "images": 64},
    "evals": {"pool": "mean", "final_norm": False, "knn_temp": 0.07},
    "run": {"wandb": {"project": ""}},
  }


def as_old(flat):
  """A flat config of an MAE as version 0.1 wrote it."""
  old = dict(flat)
  old["heads"] = old.pop("num_heads")
  old["method.decoder_heads"] = old.pop("method.decoder_num_heads")
  old |= {"evals.avgpool": 1, "evals.raw": True}
  del old["evals.pool"], old["evals.final_norm"]
  del old["method.show_max"]  # as if it came later
  return old


def test_a_run_of_an_older_version_goes_on(tmp_path):
  config = small.config(arg="mae")
  flat = run_config.flat_config(config) | {"data.images": 64}
  (tmp_path / "config.json").write_text(json.dumps(as_old(flat)))
  check = lambda config: run_config.check_config(
    config, tmp_path, images=64, defaults=setup.defaults(config)
  )
  check(config)
  config.method.show_max = 0.2  # not what the older version did
  with pytest.raises(InputError, match=r"show_max \(absent there, 0.2 here\)"):
    check(config)
  config.method.show_max = 0.1
  config.method.decoder_num_heads = 4
  with pytest.raises(InputError, match=r"num_heads \(2 there, 4 here\)"):
    check(config)


def test_a_key_that_is_no_longer_known_is_a_difference(tmp_path):
  config = small.config()
  flat = run_config.flat_config(config) | {"method.gone": 1}
  (tmp_path / "config.json").write_text(json.dumps(flat))
  with pytest.raises(InputError, match=r"gone \(1 there, absent here\)"):
    run_config.check_config(
      config, tmp_path, images=64, defaults=setup.defaults(config)
    )
