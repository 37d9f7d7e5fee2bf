"""Where samples come from: which shards, in which order, record by record.

shards        a path becomes a list of shards, local or remote
energon       which of them Megatron Energon's split names
listing       which shards a run deals from start to start; whether new ones join
walk          the files of folders and globs, none passed over
order         which records of which shard a slot reads when: a pure function of the seed
mixture       which source gives the next sample, and which waits for the others
shard_cache   shards that are open, opened before they are needed, and again after an outage
reader        one slot's position in one source: good records, bad ones rejected
permission    a folder that may not be read is not an empty one
"""
