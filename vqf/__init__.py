"""vqf: images into discrete tokens and back."""

# Importing a component package registers what is in it.
from vqf import data as data
from vqf import discriminators as discriminators
from vqf import encoders as encoders
from vqf import evaluation as evaluation
from vqf import loggers as loggers
from vqf import losses as losses
from vqf import metrics as metrics
from vqf import optimizers as optimizers
from vqf import pipelines as pipelines
from vqf import quantizers as quantizers
from vqf import transformers as transformers
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer
from vqf.registry import build, register
from vqf.runs.load import load

__version__ = "0.1.0"

__all__ = ["Generator", "Tokenizer", "build", "load", "register"]
