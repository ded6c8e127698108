// Products with weights.
#pragma once
