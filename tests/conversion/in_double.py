"""Run moe2dense in float64: what several processes sum in another order then differs by less than what any test looks at."""

import torch

from moe2dense.__main__ import main

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    main()
