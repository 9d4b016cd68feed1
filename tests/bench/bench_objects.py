"""What simple features know of the classes of the generated images.

python tests/bench/bench_objects.py [--source objects] [--size 32] [--seed 0] \\
  [--supervised]

20-nearest-neighbours of validation images among training images, on the mean
colour, the colour histogram (8 x 8 x 8 bins, square roots) and raw pixels. A
trained network has to be better than these.

--supervised also trains the network of configs/tiny.py with labels, for as many
steps of as many images, from both initialisations: what it could learn.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import neighbors

from attmask_jax.data import sources
from attmask_jax.models import layers, vit
from configs import tiny

K = 20


def histogram(images: np.ndarray) -> np.ndarray:
  """[n, H, W, 3] uint8 -> [n, 512]."""
  bins = (images // 32).astype(int) @ np.array([64, 8, 1])
  counts = [np.bincount(x.ravel(), minlength=512) for x in bins]
  return np.sqrt(counts)


FEATURES = {
  "mean colour": lambda images: images.mean((1, 2)),
  "histogram": histogram,
  "raw pixels": lambda images: images.reshape(len(images), -1).astype(float),
}


def supervised(
  images: dict[str, np.ndarray], labels: dict[str, np.ndarray], *, init: str
) -> float:
  """Accuracy of a network trained with flips and shifts, in percent."""
  config = tiny.get_config()
  config.data.image_size = images["train"].shape[1]
  network = vit.from_config(config).clone(initial=init)
  key, size = jax.random.key(0), config.data.batch_size
  example = jnp.asarray(images["train"][:1], jnp.float32)
  head = jnp.zeros((network.width, labels["train"].max() + 1))
  params = network.init(key, example)["params"], head
  steps = len(images["train"]) // size * config.optim.epochs
  rate = optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 6, steps)
  optimiser = optax.adamw(rate, weight_decay=0.05)
  state = optimiser.init(params)

  @jax.jit
  def logits(params, images):
    tokens = network.apply(
      {"params": params[0]}, vit.normalize_images(images)
    ).tokens
    return tokens[:, 0] @ params[1]

  def loss(params, images, labels):
    errors = optax.softmax_cross_entropy_with_integer_labels(
      logits(params, images), labels
    )
    return errors.mean()

  @jax.jit
  def step(params, state, images, labels):
    grads = jax.grad(loss)(params, images, labels)
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  rng = np.random.default_rng(0)
  for _ in range(steps):
    ids = rng.integers(len(images["train"]), size=size)
    batch = np.roll(images["train"][ids], rng.integers(-4, 5, 2), axis=(1, 2))
    batch = batch[:, :, :: rng.choice((-1, 1))]
    params, state = step(params, state, batch, labels["train"][ids])
  guesses = np.argmax(logits(params, images["val"]), axis=1)
  return 100 * np.mean(guesses == labels["val"])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--source", default="objects", choices=sources.GENERATED)
  parser.add_argument("--size", type=int, default=32)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--train", type=int, default=4000)
  parser.add_argument("--val", type=int, default=800)
  parser.add_argument("--supervised", action="store_true")
  options = parser.parse_args()
  images, labels = {}, {}
  for split in ("train", "val"):
    source = sources.GENERATED[options.source](
      getattr(options, split),
      size=options.size,
      seed=options.seed,
      split=split,
    )
    loaded = [np.asarray(source.load(i)) for i in range(len(source))]
    images[split], labels[split] = np.stack(loaded), source.labels
  for name, of in FEATURES.items():
    model = neighbors.KNeighborsClassifier(K)
    model.fit(of(images["train"]), labels["train"])
    score = model.score(of(images["val"]), labels["val"])
    print(f"{name}: {100 * score:.1f} %")
  for init in layers.INITS if options.supervised else ():
    score = supervised(images, labels, init=init)
    print(f"network with labels, initialised {init}: {score:.1f} %")


if __name__ == "__main__":
  main()
