"""What a number means, for readers who did not choose it."""

MEANINGS = {
    "psnr": "peak signal-to-noise ratio in dB, mean over pictures; higher is better",
    "psnr_masked": "PSNR of what is drawn, without the empty background; higher is better",
    "psnr_pooled": "PSNR of all pictures taken together; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "perceptual": "perceptual distance (EfficientNet-Lite, LPIPS form, uncalibrated); lower is better",
    "lpips": "LPIPS v0.1 on VGG16; lower is better",
    "lpips_alex": "LPIPS v0.1 on AlexNet; lower is better",
    "lpips_squeeze": "LPIPS v0.1 on SqueezeNet; lower is better",
    "usage": "share of the codebook that held-out pictures use",
    "perplexity": "codes that, used evenly, would carry as much",
    "dead": "codes that no held-out picture uses",
    "nats_per_token": "stage 2, negative log-likelihood of held-out codes; lower is better",
    "log_vocabulary": "the same of codes drawn blindly, ln of the vocabulary",
    "class_accuracy": "share of samples that a small classifier takes for the class they were asked for",
    "class_accuracy_real": "the same of held-out pictures",
    "class_accuracy_drawn": "the same of held-out pictures that went through the codes: what samples could reach",
    "class_accuracy_chance": "the same of a classifier that guesses",
}

# Of metrics that compare two sets of pictures by the features of a network.
SETS = {
    "fid": "Frechet Inception distance to real pictures; lower is better",
    "kid": "kernel Inception distance to real pictures; lower is better",
    "is": "Inception score; higher is better",
    "fd": "Frechet distance to real pictures, on other features than FID's; lower is better",
    "kd": "kernel distance to real pictures, on other features than KID's; lower is better",
    "score": "how sure another network than Inception is of what it sees, and how varied that is; higher is better",
    "precision": "share of the pictures that look real; higher is better",
    "recall": "share of real pictures that look like some of the pictures; higher is better",
    "density": "how densely real pictures lie around the pictures; higher is better",
    "coverage": "share of real pictures with one of the pictures near; higher is better",
}


def meaning(key: str) -> str:
    """Say what a number means; empty where nobody has said so here."""
    if key in MEANINGS:
        return MEANINGS[key]
    name = key.partition("_")[0]
    if name in SETS:
        return SETS[name]
    return f"reconstructions: {SETS[name[1:]]}" if name.startswith("r") and name[1:] in SETS else ""


SHARES = {"usage", *(f"class_accuracy{each}" for each in ("", "_real", "_drawn", "_chance"))}  # written in per cent

# What is said first: how the number is written, and what it counts.
HIGHLIGHTS: dict[str, tuple[str, str]] = {
    "psnr": ("{:.1f}\u00a0dB", "PSNR of held-out pictures"),
    "ssim": ("{:.3f}", "SSIM of held-out pictures"),
    "rfid": ("{:.2f}", "rFID"),
    "fid": ("{:.2f}", "FID"),
    "perplexity": ("{:,.0f}", "perplexity of their codes"),
    "nats_per_token": ("{:.2f}", "nats per held-out code"),
    "class_accuracy": ("", "of samples look like their class"),  # as in the table
}
