// From logits to tokens.
#pragma once
