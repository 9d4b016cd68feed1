"""The results of a plan as lines for a terminal."""

from typing import Any

GB = 1e9
_PARTS = (
  ("parameters", "parameters"),
  ("teacher", "teacher"),
  ("optimizer", "optimiser"),
  ("other", "centres and step"),
  ("batch", "batch"),
  ("temporaries", "activations, gradients"),
  ("program", "program, padding"),
  ("total", "together"),
)

# What an estimate says of the memory of a chip.
_FITS = {
  True: "", False: "  too many images per chip", None: "  memory not known",
}  # fmt: skip


def text(results: dict[str, Any]) -> str:
  """Memory, operations, messages and estimates of `plan.plan`."""
  topology = results["topology"]
  lines = [
    f"{topology['name']}: {topology['devices']} x {topology['device']}, "
    f"{topology['hosts']} hosts; compiled with jax "
    f"{results['versions']['jax']}",
    *_memory(results),
    f"{results['flops_per_image'] / 1e9:.1f} GFLOP per image, forward and "
    "backward",
    "compilation: "
    + ", ".join(f"{x:.0f} s" for x in results["compile_seconds"]),
  ]
  if results["collectives"] is not None:
    lines += _collectives(results)
  if results["estimate"] is not None:
    lines += _estimate(results["estimate"])
  lines += [f"assumed: {words}" for words in results["assumed"]]
  return "\n".join(lines)


def _memory(results: dict[str, Any]) -> list[str]:
  topology, tried = results["topology"], results["memory"]
  capacity = topology["memory"] / GB
  heads = "".join(f"{x['batch_size']:>12}" for x in tried)
  lines = ["", f"{'GB per device, batch':24}{heads}"]
  for key, name in _PARTS:
    values = "".join(f"{x[key] / GB:12.3f}" for x in tried)
    lines.append(f"{name:24}{values}")
  fits = "".join(f"{'fits' if x['fits'] else 'too large':>12}" for x in tried)
  lines.append(f"{f'of {capacity:.1f}':24}{fits}")
  largest = results["largest_batch"]
  words = f"largest batch found to fit: {largest}"
  per_device = largest // topology["devices"]
  lines.append(f"{words}, {per_device} per device" if largest else "none fits")
  return [*lines, ""]


def _collectives(results: dict[str, Any]) -> list[str]:
  lines = [
    "",
    f"{'messages of a step':24}{'group':>8}{'count':>8}{'arrays':>8}"
    f"{'MB':>10}{'MB sent':>10}  types",
  ]
  for x in results["collectives"]:
    types = " ".join(x["dtypes"])
    lines.append(
      f"{x['kind']:24}{x['group']:8}{x['count']:8}{x['arrays']:8}"
      f"{x['bytes'] / 1e6:10.2f}{x['sent'] / 1e6:10.2f}  {types}"
    )
  if results["unexpected_collectives"]:
    kinds = ", ".join(results["unexpected_collectives"])
    lines.append(f"the sharding does not need: {kinds}")
  return [*lines, ""]


def _estimate(estimate: dict[str, Any]) -> list[str]:
  lines = [
    f"Estimate, not a measurement, of {estimate['steps']} steps:",
    f"{'chips':>8}{'images':>8}{'ms/step':>10}{'computing':>11}{'images/s':>11}"
    f"{'days':>8}{'chip-hours':>12}",
  ]
  for x in estimate["by_chips"]:
    marks = "" if x["slices"] == 1 else f"  {x['slices']} slices"
    marks += _FITS[x["fits"]]
    lines.append(
      f"{x['chips']:8}{x['images_per_chip']:8}{x['step_seconds'] * 1e3:10.1f}"
      f"{x['efficiency']:11.1%}{x['images_per_s']:11.0f}{x['days']:8.2f}"
      f"{x['chip_hours']:12.0f}{marks}"
    )
  lines.append(
    f"each of {estimate['hosts']} hosts then delivers "
    f"{estimate['images_per_s_and_host']:.0f} images/s, "
    f"{estimate['bytes_per_s_and_host'] / 1e6:.0f} MB/s after augmentation"
  )
  return lines + [f"- {words}" for words in estimate["assumptions"]]
