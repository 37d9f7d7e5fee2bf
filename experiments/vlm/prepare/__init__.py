"""From records with image URLs, bytes or paths to WebDataset shards with the images inside. `torchtitan-vlm prepare` runs it.

options     what can be asked for
plan        the input, cut into pieces that each become a shard     (rows: reads them, records/: understands them)
pipeline    the stages, in order                                    (local and worker, or cluster: who runs them)
listing     1. hashes of URLs                                       (dedup: which are repeated)
collect     2. fetches (download/), judges and encodes (images, pictures)
shard       3. the tar file and the account of it                   (tally)
folder      where all of that lies
"""
