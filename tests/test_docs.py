"""The documents name files, configs and keys that exist."""

import functools
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SECTIONS = "method|data|optim|evals|run"
NO_KEYS = ("py", "md", "json", "jsonl", "html")  # files, such as evals.jsonl
PLACEHOLDERS = ("NAME", "ARGUMENT", "FILE")
LISTS = ("RUNS", "MASKS", "OTHERS", "NAMES")  # of arguments, in a config file
# First words of the headings of table columns that hold arguments.
ARGUMENT_COLUMNS = ("argument", "arguments", "name", "NAME", "config")
# Flags in the commands of the releases' pages, and the README's notes.
PUBLISHED_FLAGS = {
  "AttMask": """
    --arch --avgpool_patchtokens --backend --batch-size --batch_size_per_gpu
    --checkpoint --checkpoint_key --checkpoint_linear --checkpoint_pretraining
    --data-path --data_path --data_set --epochs --eval_every
    --global_crops_scale --load_from --local_crops_number --local_crops_scale
    --lr --masking_prob --masking_ratio --momentum_teacher --n_last_blocks
    --nb_knn --norm_last_layer --nproc_per_node --num_workers --out_dim
    --output_dir --output_file --pred_ratio --pred_ratio_var --pred_shape
    --pretrained_weights --shared_head --show_max --subset --subset_starts
    --teacher_temp --warmup_teacher_temp_epochs""",
  "ExtreMA": """
    -a -b --aug-spatialconsistent-color --attn_drop_rate
    --class_attention_layers --dist-url --drop_path_rate --ema-momentum
    --epochs --eval_momentum --layer_scale_init_value --log_dir --loss --lr
    --mask-ratio --multiprocessing-distributed --num-masks --opt --opt-betas
    --optimizer --output_dir --pretrained --proj-dim --save-freq --seed
    --use_mean_pooling --warmup-epochs --weight-decay --weight-decay-end""",
  # Also the flags of ExtreMA's fine-tuning, which has the same script.
  "MAE-priv": """
    -b --config --data_path --discard_ratio --finetune --head_fusion
    --image_path --img_path --lr --model_path --save_path
    --batch_size --color_jitter --dist_eval --drop_path --epochs --layer_decay
    --model --opt --opt_betas --output_dir --reprob --update_freq
    --warmup_epochs --weight_decay""",
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def names(config):
  """Dotted names of all keys and sections: {"data", "data.path", ...}."""
  found = set()
  for name, value in config.items():
    found.add(name)
    if hasattr(value, "items"):
      found |= {f"{name}.{inner}" for inner in names(value)}
  return found


def module(name):
  """configs/NAME.py, or the example of that name in CONTRIBUTING.md."""
  path = ROOT / "configs" / f"{name}.py"
  if path.exists():
    return vars(importlib.import_module(f"configs.{name}"))
  code = re.findall(
    r"```python\n(.*?)```", text(ROOT / "CONTRIBUTING.md"), re.S
  )
  block = next((c for c in code if c.startswith(f"# configs/{name}.py")), None)
  assert block, f"{path} does not exist"
  space = {}
  exec(block, space)
  return space


def _own_images(get_config, folder):
  with pytest.MonkeyPatch.context() as patch:
    space = get_config.__globals__
    pictures = space["Pictures"]("flat", folder, False, 100, 64)
    patch.setitem(space, "measure", lambda _: pictures)
    return get_config(folder)


@functools.cache
def keys(name, argument=""):
  """Keys of one recipe; none of a file that others import, such as common."""
  get_config = module(name).get("get_config")
  if name == "own_images":  # it measures the images of a folder
    argument = "/data/mine"
    get_config = functools.partial(_own_images, get_config)
  if get_config is None:
    assert not argument, f"configs/{name}.py has no recipes"
    return set()
  return names(get_config(argument) if argument else get_config())


@functools.cache
def any_keys():
  """Keys of all recipes."""
  found = set()
  for path in (ROOT / "configs").glob("*.py"):
    space = module(path.stem)
    if "get_config" in space:
      every = {"", *arguments(path.stem)}
      found |= set().union(*(keys(path.stem, a) for a in every))
  return found


def arguments(name):
  """Arguments that configs/NAME.py lists."""
  space = module(name)
  return {a for options in LISTS for a in space.get(options, {})}


def tables(page):
  """Headings and rows of each table of a page, as lists of cells."""
  blocks = re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M)
  cells = lambda line: [c.strip() for c in line.strip("|").split("|")]
  for block in blocks:
    head, _, *rows = [cells(line) for line in block.splitlines()]
    yield head, rows


def text(page):
  """The page with each continued command on one line."""
  return re.sub(r" *\\\n\s*", " ", page.read_text())


def parts(page):
  """Prose and fenced code of a page, each as one text."""
  pieces = re.split(r"^```.*$", text(page), flags=re.M)
  return "\n".join(pieces[::2]), "\n".join(pieces[1::2])


def spans(prose):
  """Code within the prose; a span may run over lines."""
  return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]


def recipes(line):
  """(config, argument) of each config file that a line names."""
  found = re.findall(r"configs/(\w+)\.py(?::(\w+))?", line)
  found += re.findall(r"--config=(\w+)(?::(\w+))?(?![\w/.])", line)
  return [(name, arg) for name, arg in found if name not in PLACEHOLDERS]


def anchors(page):
  """Anchors that the page's headings have on a rendered page."""
  titles = re.findall(r"^#+ (.*)$", parts(page)[0], re.M)
  return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pages
def test_relative_links(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if target.startswith("http"):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), target
    assert not anchor or anchor in anchors(file), target


def test_length_of_the_readme():
  assert len((ROOT / "README.md").read_text().splitlines()) < 260


@pages
def test_scripts_of_commands(page):
  for script in re.findall(r"\bpython ([\w/.]+\.py)\b", text(page)):
    assert (ROOT / script).exists(), script


@pages
def test_configs_and_their_arguments(page):
  for name, argument in recipes(text(page)):
    keys(name, "" if argument in PLACEHOLDERS else argument)


@pages
def test_arguments_in_tables(page):
  known = {"mae", "extrema"}  # of the small configs, not in a list
  known = known.union(*(arguments(p.stem) for p in ROOT.glob("configs/*.py")))
  for head, rows in tables(page):
    first = [title.partition(" ")[0] for title in head]
    columns = [i for i, word in enumerate(first) if word in ARGUMENT_COLUMNS]
    for row in rows:
      for span in spans(" ".join(row[i] for i in columns)):
        name, _, rest = span.rpartition(":")
        for argument in re.findall(r"(?<!\S)\w+(?!\S)", rest):
          assert argument in known, row
        if name:
          assert recipes(span), row  # test_configs_and_their_arguments


def test_arguments_in_the_readme():
  rows = next(
    rows for head, rows in tables(ROOT / "README.md") if head[0] == "config"
  )
  for files, options, _ in rows:
    for file in spans(files.replace(".py", "")):
      for option in " ".join(spans(options)).split():
        assert option == "..." or keys(file, option), (file, option)


@pytest.mark.parametrize("release", PUBLISHED_FLAGS)
def test_flags_of_the_releases(release):
  page = (ROOT / "docs" / "reference.md").read_text()
  section = page.split(f"## Flags of {release}\n")[1].split("\n## ")[0]
  described = re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", section)
  assert set(PUBLISHED_FLAGS[release].split()) <= set(described)


@pages
def test_flags_of_commands(page):
  """Of the one config that a command names, or else of any config."""
  if page.name == "CHANGELOG.md":
    return  # it names old keys
  prose, code = parts(page)
  for line in [*code.splitlines(), *spans(prose)]:
    named = [r for r in recipes(line) if r[1] not in PLACEHOLDERS]
    known = keys(*named[0]) if len(named) == 1 else any_keys()
    for flag in re.findall(r"--config\.([\w.]+)", line):
      assert flag in known or flag in ("SECTION.KEY", "KEY"), line


@pages
def test_keys_in_the_prose(page):
  if page.name == "CHANGELOG.md":
    return  # it names old keys
  pattern = rf"(?<![\w./])((?:{SECTIONS})\.[\w.]*\w)(?![\w/(])"
  for key in re.findall(pattern, "\n".join(spans(parts(page)[0]))):
    if key.rsplit(".")[-1] not in NO_KEYS:
      assert key in any_keys(), key
