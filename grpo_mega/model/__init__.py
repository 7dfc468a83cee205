"""From a Hugging Face folder to a megatron-core module on this mesh, and back."""
