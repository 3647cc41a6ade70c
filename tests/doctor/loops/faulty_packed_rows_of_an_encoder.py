import torch
from transformers import BertConfig, BertForMaskedLM

sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
model, steps = BertForMaskedLM(BertConfig(vocab_size=50, **sizes)), 2
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer.zero_grad()
for step in range(1, 9):
    ids = torch.randint(5, 50, (1, 12))
    positions = torch.tensor([[*range(5), *range(7)]])  # two examples in one row
    loss = model(input_ids=ids, position_ids=positions, labels=ids).loss  # fault: packed_examples_mixed
    (loss / steps).backward()
    if step % steps == 0:
        optimizer.step()
        optimizer.zero_grad()
