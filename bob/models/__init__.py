"""Networks: text-to-image, captioners, backbones, and the training of classifiers."""
