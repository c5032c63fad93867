"""LoRAs on the networks of a pipeline (`layers`), in files (`file`) and in other programs' formats (`exchange`)."""

from rewardsr.lora.file import gather as gather
from rewardsr.lora.file import load as load
from rewardsr.lora.file import load_several as load_several
from rewardsr.lora.file import locate as locate
from rewardsr.lora.file import merge_saved as merge_saved
from rewardsr.lora.file import read as read
from rewardsr.lora.file import save as save
from rewardsr.lora.full import train_in_full as train_in_full
from rewardsr.lora.layers import NAME as NAME
from rewardsr.lora.layers import active as active
from rewardsr.lora.layers import add as add
from rewardsr.lora.layers import attach as attach
from rewardsr.lora.layers import attached as attached
from rewardsr.lora.layers import delta as delta
from rewardsr.lora.layers import detach as detach
from rewardsr.lora.layers import load_state_dict as load_state_dict
from rewardsr.lora.layers import merge as merge
from rewardsr.lora.layers import names as names
from rewardsr.lora.layers import only as only
from rewardsr.lora.layers import parameters as parameters
from rewardsr.lora.layers import rank_and_alpha as rank_and_alpha
from rewardsr.lora.layers import reference as reference
from rewardsr.lora.layers import set_scale as set_scale
from rewardsr.lora.layers import state_dict as state_dict
from rewardsr.lora.layers import switches as switches
from rewardsr.lora.targets import target_shapes as target_shapes
