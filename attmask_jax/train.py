"""The training loop: data, steps, metrics, evaluations, checkpoints.

The loop knows no method: methods/base.py says what it asks of one.
"""

import contextlib
import pathlib
import signal
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview

from attmask_jax import Params, runtime
from attmask_jax import mesh as meshes
from attmask_jax.errors import NotFiniteError, StoppedError
from attmask_jax.runs import checkpoint, metrics, progress, report
from attmask_jax.runs import config as run_config
from attmask_jax.training import setup, train_step
from attmask_jax.training.epoch import Epoch
from attmask_jax.training.setup import Run, build
from attmask_jax.weights import init_from


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  start: dict[str, Params] | None = None,
) -> Run:
  """Trains to the end of the config, continuing what the directory holds.

  Args:
    config: a whole config, see configs/.
    workdir: run directory; made if missing.
    start: values in the place of initial ones, see `train_step.overlay`.

  Returns:
    The parts of the run, for later use.

  Raises:
    InputError: bad config, data or directory; nothing was written.
    NotFiniteError: the loss is NaN or infinite; the last checkpoint is kept.
    StoppedError: SIGTERM or Ctrl-C; the state was saved first.
  """
  runtime.setup(config.run)
  run = build(config)
  folder = checkpoint.check_workdir(workdir)
  run_config.check_config(
    config,
    folder,
    images=len(run.train_source),
    defaults=setup.defaults(config),
  )
  begun = 0
  # A run that continues needs nothing of the file that it started from.
  fresh = not checkpoint.steps(folder)
  if config.get("init_from") and not start and fresh:
    start, epoch = init_from.start(config, run.method, run.mesh)
    begun = epoch * run.schedules.steps_per_epoch
  with checkpoint.Checkpoints(
    folder, keep_steps=config.run.keep_steps, best=run.evaluator.best
  ) as saved:
    loop = Loop(run, folder, saved, start or {}, begun)
    run_config.write_config(config, folder, images=len(run.train_source))
    loop.run_all()
  return run


class Loop:
  """One training run under way."""

  def __init__(
    self,
    run: Run,
    folder: pathlib.Path,
    saved: checkpoint.Checkpoints,
    start: dict[str, Params],
    begun: int,
  ) -> None:
    config = run.config
    self._run, self._folder, self._saved = run, folder, saved
    self._epoch = Epoch(
      run.method,
      steps=run.schedules.steps_per_epoch,
      positions=meshes.local_positions(run.mesh, config.data.batch_size),
      batch_size=config.data.batch_size,
    )
    parts = (run.method, run.tx, run.mesh)
    # Steps done in this directory, or by the run whose weights are taken up.
    self._start = begun if saved.latest is None else saved.latest
    if saved.latest is None:
      self._state, shardings = train_step.init_state(
        *parts, seed=config.method.seed
      )
      self._state = train_step.overlay(self._state, start)
      self._state = train_step.at_step(self._state, begun)
    else:
      like = train_step.abstract_state(*parts, seed=config.method.seed)
      shardings = jax.tree.map(lambda x: x.sharding, like)
      self._state = self._restore(like)
    logging.info(
      "%s trainable parameters on %d devices",
      f"{parameter_overview.count_parameters(self._state.params):,}",
      run.mesh.size,
    )
    self._step_fn = train_step.make_step(
      *parts,
      shardings,
      seed=config.method.seed,
      accumulate=config.run.accumulate,
    )
    self._writer = metrics.MetricsWriter(
      folder,
      resume_step=self._start or -1,
      tensorboard=config.run.tensorboard,
      wandb=dict(config.run.wandb) if config.run.wandb.project else None,
    )
    self._signal: int | None = None

  def run_all(self) -> None:
    """Trains from the restored step to the last."""
    total = self._run.schedules.total_steps
    handlers = self._catch_signals()
    try:
      if self._start == 0:
        logging.info("evaluating before the first step")
        scores = self._run.evaluator.before(self._state)
        self._write(0, scores | self._figures(0))
        self._report()
      if self._start < total:
        self._train(total)
        logging.info("finished %d steps in %s", total, self._folder)
      else:
        logging.info("%s already holds all %d steps", self._folder, total)
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
      self._writer.close()

  def _train(self, total: int) -> None:
    """Steps from start to total. Reads metrics one step behind the device."""
    run = self._run
    host = run.pipeline.batches(self._start, total)
    batches = meshes.ahead(run.mesh, host)
    pending: tuple | None = None
    self._clock = progress.Clock(run.config.data.batch_size)
    bar = progress.Progress(
      total,
      self._start,
      "train",
      images_per_step=run.config.data.batch_size,
    )
    with bar, contextlib.closing(host):
      for i in range(self._start, total):
        with self._clock.waiting():
          batch = next(batches)
        scalars = run.schedules.at(i) | run.method.at(i)
        self._state, values, per_image = self._step_fn(
          self._state, batch, meshes.put(run.mesh, scalars)
        )
        if pending:
          self._take(*pending, bar)
        pending = (i, values, scalars, batch["label"], per_image)
        if self._due(i + 1, total):
          # Before a save or an evaluation, this very step must be finite.
          self._take(*pending, bar)
          pending = None
          self._after(i + 1, total)

  def _due(self, done: int, total: int) -> bool:
    """Whether the run saves after this step, or does even more."""
    config = self._run.config.run
    periods = (
      self._run.schedules.steps_per_epoch,
      config.save_steps,
      config.keep_steps,
    )
    due = any(period and done % period == 0 for period in periods)
    return due or done == total or self._stopping(done)

  def _take(
    self,
    i: int,
    values: dict[str, jax.Array],
    scalars: dict[str, np.generic],
    label: jax.Array,
    per_image: dict[str, jax.Array],
    bar: progress.Progress,
  ) -> None:
    """Reads the results of step i: checks, sums, logs."""
    numbers = {k: float(v) for k, v in jax.device_get(values).items()}
    wrong = [k for k, v in numbers.items() if not np.isfinite(v)]
    if wrong:
      self._saved.wait()
      shown = ", ".join(f"{k} = {numbers[k]}" for k in wrong)
      latest = self._saved.latest
      kept = "there is no checkpoint yet"
      if latest is not None:
        kept = f"the last good checkpoint is step {latest} of {self._folder}"
      raise NotFiniteError(
        f"step {i + 1} is not finite: {shown}; {kept}: lower "
        "optim.lr_per_256 or optim.clip, or warm up longer, in a new workdir"
      )
    numbers |= {k: float(v) for k, v in scalars.items() if np.ndim(v) == 0}
    self._epoch.add(i, numbers, label, per_image)
    self._clock.step()
    bar.update(i + 1, numbers["loss"])
    if (i + 1) % self._run.config.run.log_steps == 0:
      window = self._epoch.window.mean()
      self._epoch.window.reset()
      self._write(i + 1, window | self._clock.lap(), "train/")

  def _after(self, done: int, total: int) -> None:
    """End of an epoch, or a save between: scores, k-NN, checkpoint."""
    evals = self._run.config.evals
    s = self._run.schedules.steps_per_epoch
    scores: dict[str, float] = {}
    if done % s == 0:
      self._write(done, self._epoch.scores(), "epoch/")
      self._epoch.reset()
      if done == total or (done // s) % evals.eval_epochs == 0:
        with self._clock.paused():
          scores = self._run.evaluator.scores(self._state)
          # Before the save: a finished run is left as it is.
          figures = self._figures(done)
        self._write(done, scores | figures)
        self._report()
    self._save(done, scores)
    if self._signal is not None or self._saved.preempted(done):
      self._saved.wait()
      raise StoppedError(
        f"stopped by a signal after step {done}; the state is saved in "
        f"{self._folder}: run the same command to continue",
        signal=self._signal or signal.SIGTERM,
      )

  def _save(self, done: int, scores: dict[str, float]) -> None:
    self._writer.flush()
    items = self._state.items() | {"epoch": self._epoch.items(self._run.mesh)}
    self._run.pipeline.restore_broken(
      meshes.union(self._run.pipeline.broken)  # each process met its own
    )
    broken = {str(k): v for k, v in self._run.pipeline.broken.items()}
    sums = self._epoch.progress() | {"broken": broken}
    with self._clock.paused():
      self._saved.save(done, items, sums, metrics=scores)

  def _restore(self, like: train_step.TrainState) -> train_step.TrainState:
    """The newest checkpoint's state; takes up its epoch and broken files."""
    wanted = like.items() | {"epoch": self._epoch.items(self._run.mesh)}
    items, sums = self._saved.restore(self._start, wanted)
    self._epoch.restore(items["epoch"], sums)
    broken = {int(k): v for k, v in sums["broken"].items()}
    self._run.pipeline.restore_broken(broken)
    return like.from_items(items)

  def _figures(self, done: int) -> dict[str, float]:
    """Draws what the run shows of its state; the numbers beside it."""
    folder = self._folder / "figures"
    scores = self._run.evaluator.figures(self._state, folder)
    for path in sorted(folder.glob("*.png")):
      logging.info("drawn: %s", path)
      self._writer.write_image(done, path.stem, path)
    return scores

  def _report(self) -> None:
    """Rewrites the run's page."""
    self._writer.flush()
    if jax.process_index() == 0:
      report.write(self._folder)

  def _write(
    self, done: int, values: dict[str, float], prefix: str = ""
  ) -> None:
    evaluator = self._run.evaluator
    if evaluator.best in values:
      logging.info(
        "step %d: %s %.1f %%",
        done,
        evaluator.best_label,
        values[evaluator.best],
      )
    if values:
      self._writer.write(done, {prefix + k: v for k, v in values.items()})

  def _catch_signals(self) -> dict[int, Any]:
    """Single process: note the signal, finish the step, save, stop.

    Several processes must stop at the same step; there Orbax agrees on it.
    """
    if jax.process_count() > 1:
      return {}

    def note(number: int, _: Any) -> None:
      if self._signal is not None:
        raise KeyboardInterrupt
      self._signal = number
      logging.warning(
        "signal %d: saving and stopping after this step; once more quits at "
        "once, without saving",
        number,
      )

    caught = (signal.SIGTERM, signal.SIGINT)
    return {number: signal.signal(number, note) for number in caught}

  def _stopping(self, done: int) -> bool:
    return self._signal is not None or self._saved.preempted(done)
