"""Networks under the names that trainers put around them."""

import logging

import numpy as np
import pytest

from attmask_jax import errors
from attmask_jax.weights.torch_io import files, layouts, pth

WIDTH, PATCH, GRID = 64, 4, 2


def vit(seed, *, channels=3):
  """A ViT of one block under timm's names, of random values."""
  rng = np.random.default_rng(seed)
  sizes = {
    "pos_embed": (1, 1 + GRID**2, WIDTH),
    "cls_token": (1, 1, WIDTH),
    "patch_embed.proj.weight": (WIDTH, channels, PATCH, PATCH),
    "patch_embed.proj.bias": (WIDTH,),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
  }
  linear = {
    "attn.qkv": (3 * WIDTH, WIDTH),
    "attn.proj": (WIDTH, WIDTH),
    "mlp.fc1": (4 * WIDTH, WIDTH),
    "mlp.fc2": (WIDTH, 4 * WIDTH),
  }
  for name in ("norm1", "norm2"):
    sizes[f"blocks.0.{name}.weight"] = sizes[f"blocks.0.{name}.bias"] = (WIDTH,)
  for name, shape in linear.items():
    sizes[f"blocks.0.{name}.weight"] = shape
    sizes[f"blocks.0.{name}.bias"] = shape[:1]
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in sizes.items()
  }


def behind(prefix, tensors):
  return {prefix + name: tensor for name, tensor in tensors.items()}


GOOD, OTHER = vit(0), vit(1)
HEAD = {"mlp.0.weight": np.ones((8, WIDTH), np.float32)}

# Content of a file -> whether it holds a student besides.
ALONE = {
  "lightning": {"state_dict": behind("model.backbone.", GOOD)},
  "lightning with a head": {
    "state_dict": behind("model.backbone.", GOOD)
    | behind("model.classifier.", HEAD)
    | {"criterion.center": np.ones(3, np.float32)}
  },
  "deepspeed": {"module": GOOD, "global_steps": 5},
  "model_state_dict": {"model_state_dict": GOOD, "epoch": 5},
  "a wrapper": {"state_dict": behind("vit.", GOOD)},
  "another wrapper": behind("module.net.encoder.", GOOD),
  "within a container": {"model": {"state_dict": behind("vit.", GOOD)}},
  "under a key of its own": {"weights_of_mine": GOOD, "optimizer": {}},
  "an average alone": {"state_dict_ema": behind("module.", GOOD)},
}
PAIRS = {
  "lightly": {
    "state_dict": behind("student_backbone.vit.", OTHER)
    | behind("teacher_backbone.vit.", GOOD)
    | behind("student_projection_head.", HEAD)
  },
  "dinov2": {
    "model": behind("student.backbone.", OTHER)
    | behind("teacher.backbone.", GOOD)
    | behind("teacher.dino_head.", HEAD)
  },
  "moco": behind("backbone.", OTHER) | behind("backbone_momentum.", GOOD),
  "i-jepa": {
    "encoder": behind("module.", OTHER),
    "target_encoder": behind("module.", GOOD),
    "predictor": HEAD,
  },
  "timm": {"state_dict": OTHER, "state_dict_ema": GOOD, "epoch": 3},
  "ema": {"model": OTHER, "ema": GOOD},
  "nested": {"model": OTHER, "ema": {"decay": 0.9, "module": GOOD}},
  "mae": {"model": OTHER, "model_ema": GOOD},
  "one prefix inside the other": behind("net.", OTHER)
  | behind("net.teacher.", GOOD),
}


def first_value(path, network, **options):
  """Which network is loaded: one value of its first convolution."""
  loaded = files.load(files.read(str(path), **options), network, num_heads=2)
  return float(loaded.params["backbone"]["patch_embed"]["kernel"][0, 0, 0, 0])


def value(tensors):
  return float(tensors["patch_embed.proj.weight"][0, 0, 0, 0])


@pytest.mark.parametrize("case", [*ALONE, *PAIRS])
def test_the_teacher_is_taken_behind_any_prefix(tmp_path, case):
  path = tmp_path / "x.pth"
  pth.write(path, (ALONE | PAIRS)[case])
  assert first_value(path, "teacher") == value(GOOD)
  want = value(OTHER if case in PAIRS else GOOD)
  assert first_value(path, "student") == want


def test_what_is_left_out_is_named(caplog):
  caplog.set_level(logging.INFO)
  layouts.unwrap(ALONE["lightning with a head"])
  assert (
    f'taking the {len(GOOD)} tensors behind "model.backbone.", and not 2 '
    "others, such as criterion.center" in caplog.text
  )


def test_a_head_of_attmask_comes_with_its_backbone():
  heads = behind("model.head.", HEAD)
  ((name, tensors),) = layouts.unwrap(behind("model.backbone.", GOOD) | heads)
  assert name == "model"
  assert (
    tensors.keys() == (behind("backbone.", GOOD) | behind("head.", HEAD)).keys()
  )


def test_names_of_transformers_5_behind_a_prefix():
  embeddings = {
    "embeddings.cls_token": np.ones((1, 1, 4)),
    "embeddings.patch_embeddings.projection.weight": np.ones((4, 3, 2, 2)),
    "layers.0.mlp.fc1.bias": np.ones(4),
  }
  ((_, tensors),) = layouts.unwrap(behind("model.vit.", embeddings))
  assert "vit.encoder.layer.0.intermediate.dense.bias" in tensors
  assert layouts.kind_of(tensors) == "hf_vit"


def test_several_networks_need_a_prefix(tmp_path):
  path = tmp_path / "x.pth"
  both = behind("left.backbone.", OTHER) | behind("right.backbone.", GOOD)
  pth.write(path, {"state_dict": both})
  wanted = (
    'x.pth: there are several networks, behind "left.backbone.", '
    '"right.backbone.": name one with --config.tensor_prefix='
  )
  with pytest.raises(errors.InputError, match=wanted):
    files.read(str(path))
  for prefix in ("right", "right.", "right.backbone", "right.backbone."):
    got = first_value(path, "teacher", tensor_prefix=prefix)
    assert got == value(GOOD)
  assert first_value(path, "teacher", tensor_prefix="left") == value(OTHER)
  with pytest.raises(
    errors.InputError, match='tensor_prefix=lef.: .* behind "left.backbone.",'
  ):
    files.read(str(path), "lef")


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels_other_than_rgb_are_named(tmp_path, channels):
  pth.write(tmp_path / "x.pth", vit(0, channels=channels))
  message = f"of images with {channels} channels?, and images here have 3 .RGB"
  with pytest.raises(errors.InputError, match=message):
    first_value(tmp_path / "x.pth", "teacher")
