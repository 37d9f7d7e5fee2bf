"""What people look at: packed batches as the model gets them.

inspection    reads steps of a job's training data, and writes what follows of them (command `inspect`)
slot_view     one slot, read back from its tensors alone
page, picture, keys    slots as a page, as one PNG, as lines for programs; drawing: what page and PNG share
advice_picture    what `advise` found (costs/packing_advice)
"""
