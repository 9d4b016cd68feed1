import jax
import pytest
import small
import stopping

from attmask_jax import train
from attmask_jax.errors import InputError
from attmask_jax.training import train_step


def test_steps_that_are_traced(tmp_path, monkeypatch):
  running, calls = [], []
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda path: running.append(path)
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: running.clear())
  make_step = train_step.make_step

  def make(*args, **kwargs):
    step = make_step(*args, **kwargs)

    def call(state, *rest):
      calls.append((int(state.step) + 1, list(running)))
      return step(state, *rest)

    return call

  monkeypatch.setattr(train_step, "make_step", make)
  changes = {"run.profile_steps": (3, 4), "optim.epochs": 1}
  train.train(small.config(changes), str(tmp_path))
  traced = [step for step, active in calls if active]
  assert traced == [3, 4]
  assert all(p == [tmp_path / "profile"] for _, p in calls if p)
  assert not running


@pytest.mark.parametrize("steps", [(4, 3), (0, 5), (-1, 2), (16, 17)])
def test_traces_that_cannot_be(tmp_path, steps):
  with pytest.raises(InputError, match="from 1 to 16, such as 10,12"):
    train.train(small.config({"run.profile_steps": steps}), str(tmp_path))


def test_a_trace_ends_with_a_run_that_is_stopped(tmp_path):
  config = small.config({"run.profile_steps": (3, 9)})
  stopping.stop(config, tmp_path, 5)
  assert len(list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
  train.train(config, str(tmp_path))  # the rest of the steps
  assert len(list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))) == 2


@pytest.mark.slow
def test_a_trace_of_the_last_step_can_be_read(tmp_path):
  changes = {"run.profile_steps": (16, 16)}
  train.train(small.config(changes), str(tmp_path))
  (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
  data = jax.profiler.ProfileData.from_file(str(trace))
  assert any(list(plane.lines) for plane in data.planes)
