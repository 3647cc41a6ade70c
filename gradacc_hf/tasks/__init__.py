"""Code that several recipes can share: chats, packing, spans, tags, images, targets and more."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
