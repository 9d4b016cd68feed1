"""Studies small enough for a test, and runs that are only written."""

import json

import small

from configs import study

CHANGES = {
  "study.policies": "high,random",
  "study.networks": "16x2x2",
  "study.steps": (8, 16),
  "study.seeds": (2, 2),
  "linear.method.last_blocks": 1,
  "linear.method.lrs": (0.1, 1.0),
  "linear.optim.epochs": 1,
  "linear.data.batch_size": 16,
}


def config(changes=None, *, arg="objects"):
  """Locked config of a study of two policies and two seeds."""
  new = study.get_config(arg)
  # The network of single runs is one of the study's here.
  sizes = {k: v for k, v in small.SIZES.items() if k != "method.variant"}
  if arg != "objects":
    sizes = {
      k: v for k, v in sizes.items() if k.split(".")[1] in new[k.split(".")[0]]
    }
    sizes |= small.FAMILIES[arg.removeprefix("objects_")]
  sizes |= {"data.source": "objects"}
  new.lock().update_from_flattened_dict(sizes | CHANGES | (changes or {}))
  return new


def write_run(folder, knn, linear):
  """The files of a finished run that a study reads.

  Args:
    folder: of the run.
    knn: percent before the first step and after each epoch of 8 steps.
    linear: percent.
  """
  (folder / "linear").mkdir(parents=True)
  flat = {"data.images": 64, "data.batch_size": 8}
  (folder / "config.json").write_text(json.dumps(flat))
  lines = [{"step": 8 * i, "knn/top1": value} for i, value in enumerate(knn)]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  record = {"values": {"last/top1": linear}}
  (folder / "linear" / "results.json").write_text(json.dumps(record))
