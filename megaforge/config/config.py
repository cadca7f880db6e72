"""The whole configuration of a run: one frozen object made of the components' dataclasses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields

from megaforge.config.alert_config import AlertConfig
from megaforge.config.chat_config import ChatConfig
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.config.compliance_config import ComplianceConfig
from megaforge.config.core_text_config import CoreTextConfig
from megaforge.config.distill_config import DistillConfig
from megaforge.config.dry_run_config import DryRunConfig
from megaforge.config.evaluation_config import EvaluationConfig
from megaforge.config.fields import check_fields
from megaforge.config.generation_config import GenerationConfig
from megaforge.config.length_config import LengthConfig
from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.config.pattern import kinds_of
from megaforge.config.prometheus_config import PrometheusConfig
from megaforge.config.qat_config import QATConfig
from megaforge.config.question_config import QuestionConfig
from megaforge.config.regularization_config import RegularizationConfig
from megaforge.config.resilience_config import ResilienceConfig
from megaforge.config.reward_config import RewardConfig
from megaforge.config.rl_config import ReinforcementConfig
from megaforge.config.rollout_config import RolloutConfig
from megaforge.config.run_config import (
    DataConfig,
    LoggingConfig,
    ParallelConfig,
    TrainingConfig,
)
from megaforge.config.run_memory_config import RunMemoryConfig
from megaforge.config.stage_config import StageConfig
from megaforge.config.task_config import TaskConfig
from megaforge.errors import gathered, raise_all


@dataclass(frozen=True)
class Config:
    """Sections, as they stand in YAML. ``name`` is the preset's."""

    name: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    questions: QuestionConfig = field(default_factory=QuestionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    qat: QATConfig = field(default_factory=QATConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    rl: ReinforcementConfig = field(default_factory=ReinforcementConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    run_memory: RunMemoryConfig = field(default_factory=RunMemoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stages: StageConfig = field(default_factory=StageConfig)
    core_text: CoreTextConfig = field(default_factory=CoreTextConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    compliance: ComplianceConfig = field(default_factory=ComplianceConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    alerts: AlertConfig = field(default_factory=AlertConfig)
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    dry_run: DryRunConfig = field(default_factory=DryRunConfig)

    def validate(self, but: Collection[str] = ()) -> None:
        """Each section's own checks; :mod:`megaforge.config.check_layout` checks them against each other.

        Args:
            but: sections that are left out, as not all that was said of them could be read.

        Raises:
            UserError: with what is wrong in every section.
        """
        problems: list[str] = []
        for section in fields(self):
            if section.name != "name" and section.name not in but:
                own = getattr(self, section.name)
                with gathered(problems):
                    check_fields(own)
                    own.validate()
        raise_all(problems)
        if "model" not in but:
            for kind in kinds_of(self.model):
                kind.check(self.model)
