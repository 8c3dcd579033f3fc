"""A tiny CLIP of the real class that knows the colours of pictures, with its processor's folder."""

import torch
from PIL import Image

SIZE = 16
TOWN = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (30, 40, 220), "gray": (128,) * 3}
WORDS = ["a", "picture", "of", *TOWN]


def picture(colour, seed=0):
    """One colour with noise, large enough to be resized."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.tensor(TOWN[colour]) + 20 * torch.randn(40, 40, 3, generator=generator)
    return Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy())


def train(model, encode_images, encode_texts, steps=40):
    """A few steps of CLIP's own loss on one picture and one prompt per colour."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    texts = encode_texts([f"a picture of {colour}" for colour in TOWN])
    model.train()
    for step in range(steps):
        images = encode_images([picture(colour, step) for colour in TOWN])
        image_features, text_features = model_features(model, images, texts)
        logits = 10 * image_features @ text_features.T
        labels = torch.arange(len(TOWN))
        cross_entropy = torch.nn.functional.cross_entropy
        loss = cross_entropy(logits, labels) + cross_entropy(logits.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def model_features(model, images, texts):
    """Unit embeddings, from whichever of the two libraries the model is."""
    if hasattr(model, "encode_image"):
        features = model.encode_image(images), model.encode_text(texts)
    else:
        features = (
            model.get_image_features(pixel_values=images).pooler_output,
            model.get_text_features(**texts).pooler_output,
        )
    return [torch.nn.functional.normalize(feature, dim=-1) for feature in features]


def build(folder):
    """Write the model, its image processor and its tokenizer as transformers folders do."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(vocab={token: row for row, token in enumerate(tokens)}, merges=[])
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2}  # fmt: skip
    config = CLIPConfig(
        text_config={
            **common, "vocab_size": len(tokens), "max_position_embeddings": 24,
            "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1,
            "pad_token_id": len(tokens) - 1,
        },
        vision_config={**common, "image_size": SIZE, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    model = CLIPModel(config)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    train(
        model,
        lambda images: processor(images=images, return_tensors="pt")["pixel_values"],
        lambda texts: tokenizer(texts, padding=True, return_tensors="pt"),
    )
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return model, processor, tokenizer
