"""Input: sources of images, and the pipeline that makes batches of them.

sources.build(config.data, "train")     where images come from
pipeline.TrainPipeline(source, recipe)  batches as a pure function of the step
pipeline.eval_batches(source)           every image once, in order
"""

from attmask_jax.data.decoding import BrokenImage
from attmask_jax.data.pipeline import TrainPipeline, eval_batches
from attmask_jax.data.sources import Source, build

__all__ = ["BrokenImage", "Source", "TrainPipeline", "build", "eval_batches"]
