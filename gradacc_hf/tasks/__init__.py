"""What a recipe stands on and another could too: chats, packing, spans, tags, images, targets …"""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
