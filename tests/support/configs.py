"""A small config.json."""





PLAIN = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 64,
         "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "tie_word_embeddings": False,
         "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
