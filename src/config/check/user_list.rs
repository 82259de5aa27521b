//! Checks the declarations of user lists; their content is read later.

use crate::config::document::Path;
use crate::config::{ListSource, UserList, file, value};
use crate::routing::user_list;

use super::Checker;

impl Checker<'_> {
    pub(super) fn user_list(&mut self, list: &file::UserList, at: &Path) -> Option<UserList> {
        let name = self.name(&list.name, at);
        let expires_at = self.optional(list.expires.as_deref(), &at.key("expires"), value::day);
        if expires_at.flatten().is_some_and(|at| at <= self.around.now) {
            let owner = list
                .owner
                .as_ref()
                .map(|owner| format!("ask {owner} whether it can go"));
            self.warn(
                &at.key("expires"),
                format!("user list `{}` has expired and still works", list.name),
                owner,
            );
        }
        let format = self.list_format(list, at);
        if self.document.is_unknown(&at.key("file")) {
            return None;
        }
        let path = self.around.directory.join(&list.file);
        let source = ListSource {
            path,
            format: format?,
        };
        Some(UserList {
            name: name?,
            source,
            owner: list.owner.clone(),
            expires_at: expires_at?,
        })
    }

    fn list_format(&mut self, list: &file::UserList, at: &Path) -> Option<user_list::Format> {
        match (list.format, &list.column) {
            // The key that does not fit, or is missing, may be the one that was cut out.
            _ if self.document.is_maimed(at) => None,
            (file::ListFormat::Lines, None) => Some(user_list::Format::Lines),
            (file::ListFormat::Lines, Some(_)) => {
                self.error(
                    &at.key("column"),
                    "only CSV and JSON lists have a column",
                    None,
                );
                None
            }
            (file::ListFormat::Csv, Some(column)) => Some(user_list::Format::Csv {
                column: column.clone(),
            }),
            (file::ListFormat::Csv, None) => {
                self.error(
                    &at.key("format"),
                    "a CSV list needs `column`, the header of its id column",
                    None,
                );
                None
            }
            (file::ListFormat::Json, column) => Some(user_list::Format::Json {
                field: column.clone(),
            }),
        }
    }
}
