"""Imports and exports checkpoints of taming-transformers, latent-diffusion, diffusers, LlamaGen and Janus.

`key_tables` maps their tensor names to vqf's, `infer_config` reads the model's sizes from the tensors, `import_model`
and `export_model` combine the two; `unpickle` opens pickled files without running code in them.
"""
