"""How samples are judged. A metric lives outside the LightningModule: it is not trained, saved or averaged with it."""
