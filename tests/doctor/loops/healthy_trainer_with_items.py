import tempfile

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
ids = torch.randint(20, (32, 6))
arguments = transformers.TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    num_train_epochs=1,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
trainer = transformers.Trainer(
    LlamaForCausalLM(config), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
