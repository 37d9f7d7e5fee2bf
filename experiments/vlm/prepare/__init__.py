"""From records that name their images to WebDataset shards with the images inside.

Records are read and parsed by training's own readers and formats (data/formats).

options     what can be asked for
shard_plan  the input in pieces that each become a shard; the walk through one's records
runner      the stages, in order (start and worker, or cluster: who runs them)
dedup       1. hashes of URLs, and which are repeated
collect     2. fetches (data/storage/client; journal: what came), judges and encodes (images)
shard       3. the tar file (records: its members) and the account of it
folder      where all of that lies
progress    how far a run is; stop: the wish to end, by a signal or the parent's death
"""
