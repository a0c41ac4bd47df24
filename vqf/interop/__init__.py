"""Checkpoints of other projects, read and written.

`layouts` says which of their names is which of vqf's, `geometry` reads the sizes off the tensors, `reading` and
`writing` put both together; `unpickle` opens their files without running what is in them.
"""
