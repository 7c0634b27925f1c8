//! What becomes of the images of a former daemon's move.
//!
//! Owns that judgement, from what init keeps alone. Refuses to act. Invariants: an image is served, or promised, as long as
//! anybody may need it; one that nobody needs is neither, for whoever could release it has done so and does not come again.

use super::records::{ImageRecord, KeptSource, unused_label};
use super::recover::parked;
use dunlin_cluster::relocation::source::{SourceRecord, SourceStage};
use dunlin_proto::ids::{ImageId, Pid};
use std::collections::BTreeSet;

/// An image and its keeper, by its number on this machine.
pub(super) type Kept = (ImageRecord, i32);

/// The images of one move.
#[derive(Debug, Default)]
pub(super) struct Fates {
    /// The move still has to do with these.
    pub(super) kept: Vec<Kept>,
    /// Processes whose images all have released, perhaps before there was a keeper.
    pub(super) released: BTreeSet<Pid>,
    /// Will be made, and served, when the decision is known.
    pub(super) coming: Vec<ImageId>,
    /// The move is done with these, but their keepers were too busy to be ended.
    pub(super) over: Vec<Kept>,
}

impl Fates {
    /// Judges by the record of a move, the images with keepers that it left, and the labels by which init keeps what is
    /// not needed any more.
    pub(super) fn of(source: &KeptSource, images: Vec<Kept>, unused: &BTreeSet<String>) -> Fates {
        let record = &source.record;
        let id = record.plan.move_id;
        let mut released = members(record);
        released.retain(|pid| unused.contains(&unused_label(id, *pid)));
        let (kept, over): (Vec<Kept>, Vec<Kept>) =
            (images.into_iter()).partition(|(image, _)| may_be_needed(record, image.pid));
        let is_coming = |image: &ImageId| !kept.iter().any(|(known, _)| known.id == *image);
        let left = source.left.iter().filter(|left| !released.contains(&left.pid));
        let coming = left.filter_map(|left| left.image).filter(is_coming).collect();
        Fates {
            kept,
            released,
            coming,
            over,
        }
    }

    /// Those that are to be served at once.
    pub(super) fn served(&self) -> impl Iterator<Item = &Kept> {
        self.kept
            .iter()
            .filter(|(image, _)| !self.released.contains(&image.pid))
    }
}

/// Is it not yet known that all pages of a process have come?
fn may_be_needed(record: &SourceRecord, pid: Pid) -> bool {
    match &record.stage {
        SourceStage::Image { undrained, .. } => undrained.contains(&pid),
        SourceStage::Freezing(_) | SourceStage::Parked(_) => true,
    }
}

/// All processes that a record tells of.
pub(super) fn members(record: &SourceRecord) -> BTreeSet<Pid> {
    match &record.stage {
        SourceStage::Image { members, .. } => members.iter().map(|member| member.pid).collect(),
        SourceStage::Freezing(_) | SourceStage::Parked(_) => parked(record).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::records::Left;
    use super::*;
    use dunlin_cluster::relocation::source::Plan;
    use dunlin_proto::ids::{Incarnation, MoveId, Slot};
    use dunlin_proto::relocation::Member;

    const MOVE: MoveId = MoveId {
        source: Slot(1),
        nonce: 7,
    };
    const ONE: Pid = Pid(129);
    const OTHER: Pid = Pid(193);

    fn image_of(pid: Pid) -> ImageId {
        ImageId {
            holder: Slot(1),
            nonce: pid.0 as u64,
        }
    }

    fn left(pid: Pid) -> Left {
        Left {
            pid,
            host: 4000 + pid.0,
            arena: None,
            image: Some(image_of(pid)),
            regions: Vec::new(),
            pending: Vec::new(),
            streams: Vec::new(),
        }
    }

    fn kept(pid: Pid) -> Kept {
        let record = ImageRecord {
            id: image_of(pid),
            by: MOVE,
            pid,
            keeper: Pid(pid.0 + 1),
            regions: Vec::new(),
        };
        (record, 5000 + pid.0)
    }

    fn member(pid: Pid) -> Member {
        Member {
            pid,
            incarnation: Incarnation(0),
            ids: Vec::new(),
            images: Vec::new(),
            homes: BTreeSet::new(),
        }
    }

    fn source(undrained: Option<&[Pid]>, left: Vec<Left>) -> KeptSource {
        let members = vec![member(ONE), member(OTHER)];
        let stage = match undrained {
            None => SourceStage::Parked(members),
            Some(undrained) => SourceStage::Image {
                members,
                undrained: undrained.iter().copied().collect(),
            },
        };
        let plan = Plan {
            move_id: MOVE,
            home: Slot(1),
            destination: Slot(2),
        };
        KeptSource {
            record: SourceRecord { plan, stage },
            left,
        }
    }

    fn unused(pids: &[Pid]) -> BTreeSet<String> {
        pids.iter().map(|pid| unused_label(MOVE, *pid)).collect()
    }

    #[test]
    fn an_image_that_was_released_while_its_process_was_parked_is_not_promised_again() {
        let source = source(None, vec![left(ONE), left(OTHER)]);
        let fates = Fates::of(&source, Vec::new(), &unused(&[ONE]));
        assert_eq!(fates.coming, [image_of(OTHER)]);
        assert_eq!(fates.released, [ONE].into());
    }

    #[test]
    fn an_image_that_was_released_before_it_had_a_record_is_kept_to_be_ended_and_not_served() {
        let source = source(Some(&[ONE, OTHER]), vec![left(ONE), left(OTHER)]);
        let fates = Fates::of(&source, vec![kept(ONE)], &unused(&[ONE]));
        assert_eq!(fates.served().count(), 0);
        assert_eq!(fates.kept.len(), 1);
        assert_eq!(fates.released, [ONE].into());
        assert_eq!(fates.coming, [image_of(OTHER)]);
    }

    #[test]
    fn what_nobody_has_released_is_served() {
        let source = source(Some(&[ONE, OTHER]), vec![left(OTHER)]);
        let fates = Fates::of(&source, vec![kept(ONE)], &unused(&[]));
        assert_eq!(fates.served().map(|(image, _)| image.pid).collect::<Vec<_>>(), [ONE]);
        assert_eq!(fates.coming, [image_of(OTHER)]);
        assert!(fates.released.is_empty() && fates.over.is_empty());
    }

    #[test]
    fn a_keeper_that_was_too_busy_to_be_ended_is_ended_though_its_move_goes_on() {
        let source = source(Some(&[OTHER]), Vec::new());
        let fates = Fates::of(&source, vec![kept(ONE), kept(OTHER)], &unused(&[ONE]));
        assert_eq!(fates.over.iter().map(|(_, host)| *host).collect::<Vec<_>>(), [5129]);
        assert_eq!(fates.served().count(), 1);
    }
}
