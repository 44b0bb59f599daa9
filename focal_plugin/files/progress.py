"""The bar of work that may take long: on a terminal alone, from the third second on, and gone at the end."""

from functools import partial

from tqdm import tqdm

progress = partial(tqdm, unit="image", delay=3, leave=False, disable=None)
