"""What people look at: packed batches as the model gets them, and how full slots get.

inspection    reads steps of a job's training data, and writes what follows of them (command `inspect`)
slot_view     one slot, read back from its tensors alone
page, picture, keys    slots as a page, as one PNG, as lines for programs; drawing: what page and PNG share

packing_advice  which S and L waste least on a data set (command `advise`): packing_simulation, advice_picture
"""
