"""The last import of a server that forks: what its children share is not collected again in each of them."""

import gc

gc.collect()
gc.freeze()
