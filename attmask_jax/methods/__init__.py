"""Methods by name, and what a method is.

A method is a frozen dataclass in one file with

  from_config(config, *, steps_per_epoch) -> method; raises InputError
  init(rng) -> params, teacher, aux
  at(step) -> {name: numpy scalar}: temperatures, counts; host, float64
  item_extras(epoch, index) -> {name: array}: host-side extras of one image
  loss(params, teacher, aux, batch, rng, scalars)
      -> loss, (stats, metrics, per_image)
  update_aux(aux, stats) -> aux, once per optimiser step
  features(weights, images, *, last, norm) -> cls [B, last * D] or None,
      patches [B, N, D]
  attention(weights, images) -> [B, A, N], what pictures of masks start from

and the declared properties

  teacher_first    the teacher moves before the forward pass
  batch_coupled    images meet in the loss, so accumulation would change it
  frozen_at_start  regex of leaves held for `optim.freeze_epochs`, or None
  untrained        regex of leaves in `params` that never move, or None
  undecayed        regex of leaves without weight decay, None = biases, scales
  lr_scale         (name, leaf) -> rate of a leaf over that of the run, or None
  classifies       evaluated by accuracy, else by k-NN on the teacher

A method that classifies offers `assemble(params, aux) -> weights` and
`all_logits(weights, images) -> [B, J, C]`. Of others the evaluations while it
trains read `backbone`, and `shown_ratio` and `show_max` for pictures of masks;
with evals.knn_temp=0 also `teacher_temp`. Optional: `reconstruct` (pictures of
it are drawn), `assignments(weights, images) -> [B]` (prototypes, scored against
labels) and `served_aux` (names in `aux` that go with the weights).

`params` is what the optimiser sees. `teacher` is its own tree, {} for none;
each of its leaf paths exists in `params`, and the moving average walks the
teacher's paths. `aux` is neither trained nor averaged: `loss` reads it,
`update_aux` alone changes it. `per_image` maps "assignment" [B] int32 to the
prototype that scores per epoch are made of, or is {}.

`batch` holds label [B] and position [B] (row of the global batch, which random
draws are keyed by), what `item_extras` gives, each with a leading B, and what
the transform of `data.transform` makes of an image: "multi_crop" gives images
[B, G, S, S, 3] and, with local crops, local_images; "crop_flip" and
"supervised" images [B, 1, S, S, 3]; "two_colours" and "centre_crop" two.

To make a new method: copy a file, add a line here, a config and a test; the
loop stays as it is. `checks.own_fields` fills the fields of the dataclass from
keys of the same name in the config's section `method`; a key without a field is
for `from_config` to read. Ranges of numbers stand in `setup.RANGES`, rules
between values in `checks`. A new mask policy goes into the tuples of
masking.py, and its name for pictures into evals/visualize.py.
"""

from attmask_jax.methods import attmask, classify, extrema, mae

METHODS = {
  "attmask": attmask.AttMask,
  "extrema": extrema.ExtreMA,
  "mae": mae.Mae,
  "classify": classify.Classify,
}
