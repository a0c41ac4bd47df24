"""What every training imports when it comes to it, imported at once: each fork of this process is then spared it.

Most of it is what torch's optimizers import at their first step. No thread is started: a fork would lose it.
"""

import einops._torch_specific  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
from PIL import Image

from tests.support.composing import compose

Image.init()  # imports the module of every format
compose()  # Hydra looks for its plugins, and builds the parser of its grammar
