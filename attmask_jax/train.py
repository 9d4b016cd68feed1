"""The training loop: data, steps, metrics, evaluations, checkpoints.

The loop knows no particular method, only the interface of methods/base.py.
"""

import contextlib
import pathlib
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview

from attmask_jax import Batch, Params, runtime
from attmask_jax import mesh as meshes
from attmask_jax.errors import NotFiniteError, StoppedError
from attmask_jax.runs import (
  checkpoint,
  judgement,
  lock,
  metrics,
  progress,
  report,
  trace,
)
from attmask_jax.runs import config as run_config
from attmask_jax.training import lengths, setup, train_step
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
    config: a complete config, see configs/.
    workdir: run directory; made if missing.
    start: values that replace initial ones, see `train_step.overlay`.

  Returns:
    The parts of the run, for later use.

  Raises:
    InputError: bad config, data or directory; nothing was written.
    NotFiniteError: the loss or a weight is NaN or infinite; the last checkpoint
      is kept.
    SaveError: the disk is full, or another process has taken the directory.
    StoppedError: SIGTERM or Ctrl-C; the state was saved first, unless it came
      twice.
  """
  runtime.setup(config.run)
  run = build(lengths.continued(config, workdir))
  config = run.config  # with the lengths that the run uses
  folder = checkpoint.check_workdir(workdir)
  run_config.check_config(
    config,
    folder,
    images=len(run.train_source),
    defaults=setup.defaults(config),
  )
  with lock.RunLock(folder, break_lock=config.run.break_lock) as held:
    start, begun = _start(run, folder, start)
    with checkpoint.Checkpoints(
      folder,
      keep_steps=_kept_periods(run),
      best=run.evaluator.best,
      alone=held.alone,
    ) as saved:
      loop = Loop(run, folder, held, saved, start, begun)
      run_config.write_config(config, folder, images=len(run.train_source))
      loop.run()
    if jax.process_index() == 0:
      logging.info("%s", judgement.read(folder).sentence)
  return run


def _kept_periods(run: Run) -> tuple[int, ...]:
  """Steps whose multiples have a checkpoint that stays."""
  keys, s = run.config.run, run.schedules.steps_per_epoch
  return tuple(filter(None, (keys.keep_steps, keys.keep_epochs * s)))


def _start(
  run: Run, folder: pathlib.Path, given: dict[str, Params] | None
) -> tuple[dict[str, Params], int]:
  """Values that replace initial ones, and the steps that lie behind them."""
  if given:
    return given, 0
  # A run that continues does not read the file that it started from.
  if not run.config.get("init_from") or checkpoint.steps(folder):
    return {}, 0
  start, epoch = init_from.start(run.config, run.method, run.mesh)
  return start, epoch * run.schedules.steps_per_epoch


class Loop:
  """One training run under way."""

  def __init__(
    self,
    run: Run,
    folder: pathlib.Path,
    held: lock.RunLock,
    saved: checkpoint.Checkpoints,
    start: dict[str, Params],
    begun: int,
  ) -> None:
    config = run.config
    self._run, self._folder = run, folder
    self._lock, self._saved = held, saved
    self._epoch = Epoch(
      run.method,
      steps=run.schedules.steps_per_epoch,
      positions=meshes.local_positions(run.mesh, config.data.batch_size),
      batch_size=config.data.batch_size,
    )
    parts = (run.method, run.tx, run.mesh)
    # Steps done in this directory, or by the run that `init_from` continues.
    self._start = begun
    if saved.agreed_latest() is None:
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
    self._train_step = train_step.make_step(
      *parts,
      shardings,
      seed=config.method.seed,
      accumulate=config.run.accumulate,
      augment=run.augment,
    )
    self._writer = metrics.MetricsWriter(
      folder,
      resume_step=self._start or -1,
      tensorboard=config.run.tensorboard,
      wandb=dict(config.run.wandb) if config.run.wandb.project else None,
      config=run_config.flat_config(config),
    )
    self._signal: int | None = None

  def run(self) -> None:
    """Trains from the restored step to the last one."""
    start, total = self._start, self._run.schedules.total_steps
    with contextlib.closing(self._writer), self._signals_noted():
      if start == 0:
        self._evaluate_untrained()
      if start >= total:
        logging.info("%s already holds all %d steps", self._folder, total)
        return
      with (
        self._progress(total) as bar,
        self._batches(total) as batches,
        self._trace() as tracing,
      ):
        pending: tuple | None = None
        for i in range(start, total):
          tracing.before(i + 1, self._state)
          with self._clock.waiting():
            batch = next(batches)
          scalars = self._run.schedules.at(i) | self._run.method.at(i)
          self._state, values, per_image = self._train_step(
            self._state, batch, meshes.put(self._run.mesh, scalars)
          )
          # Metrics are read one step late, while the device is busy.
          if pending:
            self._record(*pending, bar)
          pending = (i, values, scalars, batch["label"], per_image)
          if self._save_due(i + 1, total):
            # Before a save or an evaluation, this very step must be finite.
            self._record(*pending, bar)
            pending = None
            self._evaluate_and_save(i + 1, total)
    logging.info("finished %d steps in %s", total, self._folder)

  def _evaluate_untrained(self) -> None:
    """Scores and figures at step 0."""
    logging.info("evaluating before the first step")
    scores = self._run.evaluator.before(self._state)
    self._write(0, scores | self._draw(0))
    self._report()

  def _progress(self, total: int) -> progress.Progress:
    """Starts the clock and the progress line."""
    images = self._run.config.data.batch_size
    self._clock = progress.Clock(images)
    return progress.Progress(
      total, self._start, "train", images_per_step=images
    )

  @contextlib.contextmanager
  def _batches(self, total: int) -> Iterator[Iterator[Batch]]:
    """The batches from the first step to the last, on the devices."""
    host = self._run.pipeline.batches(self._start, total)
    with contextlib.closing(host):
      yield meshes.ahead(self._run.mesh, host)

  def _trace(self) -> trace.Trace:
    """The trace of run.profile_steps."""
    steps = self._run.config.run.profile_steps
    return trace.Trace(self._folder / "profile", steps)

  def _save_due(self, done: int, total: int) -> bool:
    """Whether a save, perhaps with an evaluation, follows `done` steps."""
    config = self._run.config.run
    periods = (
      self._run.schedules.steps_per_epoch,
      config.save_steps,
      config.keep_steps,
    )
    due = any(period and done % period == 0 for period in periods)
    return due or done == total or self._stopping(done)

  def _record(
    self,
    i: int,
    values: dict[str, jax.Array],
    scalars: dict[str, np.generic],
    label: jax.Array,
    per_image: dict[str, jax.Array],
    bar: progress.Progress,
  ) -> None:
    """Checks, sums and logs the results of step i."""
    numbers = {k: float(v) for k, v in jax.device_get(values).items()}
    wrong = [k for k, v in numbers.items() if not np.isfinite(v)]
    if wrong:
      self._stop_not_finite(i + 1, [f"{k} = {numbers[k]}" for k in wrong])
    numbers |= {k: float(v) for k, v in scalars.items() if np.ndim(v) == 0}
    self._epoch.add(i, numbers, label, per_image)
    self._clock.step()
    bar.update(i + 1, numbers["loss"])
    if (i + 1) % self._run.config.run.log_steps == 0:
      window = self._epoch.window.mean()
      self._epoch.window.reset()
      self._write(i + 1, window | self._clock.lap(), "train/")

  def _stop_not_finite(self, step: int, names: list[str]) -> NoReturn:
    self._saved.wait()
    raise NotFiniteError(
      f"step {step} is not finite: {', '.join(names)}; {self._kept()}: lower "
      "optim.lr_per_256 or optim.clip, or warm up longer, in a new workdir"
    )

  def _kept(self) -> str:
    """What a later start continues from."""
    latest = self._saved.latest
    if latest is None:
      return "there is no checkpoint yet"
    return f"the last good checkpoint is step {latest} of {self._folder}"

  def _evaluate_and_save(self, done: int, total: int) -> None:
    """At the end of an epoch scores and evaluates; always saves.

    Raises:
      NotFiniteError: the step made a weight infinite; it is not saved.
      SaveError: another process has taken the directory over.
      StoppedError: a signal came; the state is saved.
    """
    self._lock.check()
    flags = jax.device_get(train_step.not_finite(self._state))
    if any(flags.values()):
      self._stop_not_finite(done, [name for name, bad in flags.items() if bad])
    evals = self._run.config.evals
    s = self._run.schedules.steps_per_epoch
    scores: dict[str, float] = {}
    if done % s == 0 or done == total:
      self._write(done, self._epoch.scores(), "epoch/")
      self._epoch.reset()
      if done == total or (done // s) % evals.eval_epochs == 0:
        with self._clock.paused():
          scores = self._run.evaluator.scores(self._state)
          # Before the save: a finished run is left as it is.
          figures = self._draw(done)
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
    """Restores state, epoch sums and broken files of the newest checkpoint."""
    wanted = like.items() | {"epoch": self._epoch.items(self._run.mesh)}

    def use(items: dict[str, Params], sums: dict[str, Any]) -> None:
      self._epoch.restore(items["epoch"], sums)
      broken = {int(k): str(v) for k, v in sums["broken"].items()}
      self._run.pipeline.restore_broken(broken)

    self._start, items = self._saved.restore_latest(wanted, use)
    return like.from_items(items)

  def _draw(self, done: int) -> dict[str, float]:
    """Draws the figures; returns the numbers measured for them."""
    folder = self._folder / "figures"
    scores = self._run.evaluator.figures(self._state, folder)
    for path in sorted(folder.glob("*.png")):
      logging.info("drawn: %s", path)
      self._writer.write_image(done, path.stem, path)
    return scores

  def _report(self) -> None:
    """Rewrites report.html, and warns of a collapse."""
    self._writer.flush()
    if jax.process_index() == 0:
      report.write(self._folder)
      if collapse := judgement.read(self._folder).collapse:
        logging.warning("%s", collapse)

  def _write(
    self, done: int, values: dict[str, float], prefix: str = ""
  ) -> None:
    evaluator = self._run.evaluator
    if evaluator.best in values:
      logging.info(
        "step %d: %s %s %%",
        done,
        evaluator.best_label,
        metrics.percent(values[evaluator.best]),
      )
    if values:
      self._writer.write(done, {prefix + k: v for k, v in values.items()})

  @contextlib.contextmanager
  def _signals_noted(self) -> Iterator[None]:
    """In a single process a signal finishes the step, saves and stops.

    Several processes must stop at the same step; there Orbax agrees on it.
    """

    def note(number: int, _: Any) -> None:
      if self._signal is not None:
        raise KeyboardInterrupt
      self._signal = number
      logging.warning(
        "signal %d: saving and stopping after this step; once more quits at "
        "once, without saving",
        number,
      )

    single = jax.process_count() == 1
    caught = (signal.SIGTERM, signal.SIGINT) if single else ()
    before = {number: signal.signal(number, note) for number in caught}
    try:
      yield
    except KeyboardInterrupt as error:
      raise StoppedError(
        f"interrupted without saving; {self._kept()}: the same command "
        "continues from there",
        signal=signal.SIGINT,
      ) from error
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _stopping(self, done: int) -> bool:
    return self._signal is not None or self._saved.preempted(done)
